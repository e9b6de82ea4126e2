"""What a layer starts with that nothing is carried to: the size of its norm, its convolution, and every dtype."""

import pytest
import torch

from tests.checkpoint.hf_models import save_hf
from tests.checkpoint.test_linearised_import import linearised, repeated

ATTENTION = "model.layers.*.self_attn."
CARRIED = "; ".join(f"{name} = {ATTENTION}{name}_proj.weight" for name in "qkv")
PROJECTIONS = {
    "gated_deltanet": ("carried", f"{CARRIED}; a, b, g = 0"),
    "deltanet": ("carried", f"{CARRIED}; b = 0"),
    "mamba2": ("started", "dt, g = 0; x random"),
}
"""What is told of the fused projection; mamba2 is as wide as two attentions."""

FLOAT32 = {"A_log", "dt_bias", "D"}
"""Numbers of the decay, in any model."""


def of_half_precision(rank, world, folder, mixer):
    save_hf(f"{folder}/hf", "qwen2_moe", num_experts_per_tok=2, dtype=torch.bfloat16)
    ours, theirs, origins, *_ = linearised(rank, world, folder, mixer, {})
    return ours, theirs, origins


@pytest.mark.parametrize("mixer", PROJECTIONS)
def test_a_layer_starts(gloo, tmp_path, mixer):
    ours, theirs, origins = gloo(1, of_half_precision, str(tmp_path), mixer)[0]
    prefix = "decoder.layers.0.self_attention."
    found = {key.removeprefix(prefix): tensor for key, tensor in ours.items() if key.startswith(prefix)}
    assert {name for name, tensor in found.items() if tensor.dtype == torch.float32} == FLOAT32 & found.keys()
    assert all(tensor.dtype == torch.bfloat16 for name, tensor in found.items() if name not in FLOAT32)
    for name in {"conv_weight", "group_conv_weight"} & found.keys():
        assert (found[name][..., -1] == 1).all() and not found[name][..., :-1].any()
    assert origins["self_attention.in_proj.weight", 0] == PROJECTIONS[mixer]
    for name in FLOAT32 & found.keys():
        assert origins[f"self_attention.{name}", 0] == ("started", f"as {mixer} from scratch")
    how = origins["self_attention.norm_weight", 0]
    if mixer == "mamba2":
        assert how == ("started", "as mamba2 from scratch") and (found["norm_weight"] == 1).all()
        assert origins["self_attention.group_proj.weight", 0] == ("started", "b, c random")
        assert origins["self_attention.out_proj.weight", 0] == ("started", "random: another width")
        for name, size in (
            ("group_proj", 0.02),
            ("out_proj", 0.02 / (2 * 2) ** 0.5),
        ):  # of two layers, two each
            random = found[f"{name}.weight"].float()
            assert 0.9 < random.std() / size < 1.1 and abs(random.mean()) < 0.2 * size, (
                "as a training starts them"
            )
        return
    assert how == ("started", f"half the size of the values of {ATTENTION}v_proj.weight")
    # Values of inputs whose channels have size 1 behind the norm; a gate of one half is made up for.
    weight, norm = (
        theirs[f"model.layers.0.{name}.weight"].double() for name in ("self_attn.v_proj", "input_layernorm")
    )
    size = sum(((weight[row] * norm) ** 2).sum() for row in range(len(weight))).div(len(weight)).sqrt()
    expected = 0.5 * size / (0.5 if mixer == "gated_deltanet" else 1.0)
    torch.testing.assert_close(
        found["norm_weight"].double(), expected.expand_as(found["norm_weight"]), rtol=0.01, atol=0
    )


def of_other_names(rank, world, folder, mixer, options):
    save_hf(f"{folder}/hf", "qwen2_moe", num_experts_per_tok=2)
    ours, theirs, origins, _, parts = linearised(rank, world, folder, mixer, {"extra_args": options.split()})
    return ours, theirs, origins, parts


AS_WIDE = "--mamba2-expand 1 --mamba2-ssm-head-dim 16 --mamba2-state-size 16 --mamba2-num-groups 4"
"""A Mamba2 layer with the heads and channels of the softmax layer."""


def test_mamba2_and_hgrn2_go_on_under_their_own_names(gloo, tmp_path):
    """Mamba2 reads with c, writes at b and writes x; HGRN2 writes i, and what it forgets says where."""
    name = "model.layers.0.self_attn."
    ours, theirs, origins, parts = gloo(1, of_other_names, str(tmp_path / "a"), "mamba2", AS_WIDE)[0]
    assert torch.equal(parts["in_proj.x"].flatten(0, 1), repeated(theirs[f"{name}v_proj.weight"]))
    grouped = ours["decoder.layers.0.self_attention.group_proj.weight"].unflatten(0, (4, 2, 16))
    assert torch.equal(grouped[:, 0].flatten(0, 1), repeated(theirs[f"{name}k_proj.weight"]))
    assert torch.equal(grouped[:, 1].flatten(0, 1), theirs[f"{name}q_proj.weight"])
    told = f"b = {ATTENTION}k_proj.weight; c = {ATTENTION}q_proj.weight"
    assert origins["self_attention.group_proj.weight", 0] == ("carried", told)
    assert not parts["in_proj.g"].any() and not parts["in_proj.dt"].any()
    options = "--hgrn2-expand-ratio 16"
    _, theirs, origins, parts = gloo(1, of_other_names, str(tmp_path / "b"), "hgrn2", options)[0]
    assert torch.equal(parts["in_proj.i"].flatten(0, 1), repeated(theirs[f"{name}v_proj.weight"]))
    assert torch.equal(parts["in_proj.q"].flatten(0, 1), theirs[f"{name}q_proj.weight"])
    told = f"q = {ATTENTION}q_proj.weight; i = {ATTENTION}v_proj.weight; f random"
    assert origins["self_attention.in_proj.weight", 0] == ("carried", told)
