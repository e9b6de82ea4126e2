"""What layers of one model share: tables that count once over pipeline stages, a first value that recomputing loses."""

import math

import pytest
import torch

from tests.regression.whole_models import build
from tests.training.tiny import ARGUMENTS, train

KINDS = ["hgrn2", "gla", "softmax", "hgrn2", "mom_hgrn2", "mom_hgrn2", "gla", "gla"]
PP2 = ("--pipeline-model-parallel-size", "2")
VPP2 = ("--num-virtual-stages-per-pipeline-rank", "2")


def norm_of_tables(rank: int, world: int, flags: tuple[str, ...], vp_stages: int) -> tuple[float, int]:
    """Megatron's norm over all stages when the tables are ones and all else is zero; elements of the tables here."""
    from megatron.training.utils import calc_params_l2_norm

    model = build(KINDS, *flags, vp_stages=vp_stages, dtype=torch.float32)
    chunks = model if isinstance(model, list) else [model]
    elements = 0
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            is_table = "_tables." in name
            parameter.data.fill_(float(is_table))
            elements += is_table * parameter.numel()
    return calc_params_l2_norm(chunks), elements


@pytest.mark.parametrize("flags,chunks", [((), 1), (PP2, 1), ((*PP2, *VPP2), 2)], ids=["one", "pp2", "vpp2"])
def test_tables_count_once(gloo, flags, chunks):
    """As in the norm of gradients, which asks the same of every parameter."""
    one = 2 * 64 * 2  # two tables of two layers, 64 channels
    for norm, elements in gloo(2 if flags else 1, norm_of_tables, flags, chunks):
        assert elements == chunks * one
        assert norm == pytest.approx(math.sqrt(one), rel=1e-6)


def tables_of_other_stages(rank: int, world: int) -> tuple[bool, list[torch.Tensor | None]]:
    """Of a stage without such a layer: whether its tables change nothing, and their gradients."""
    model = build(["hgrn2", "gla", "gla", "gla"], *PP2, train=True, dtype=torch.float32)
    tables = [x for name, x in model.named_parameters() if "_tables." in name]
    if rank == 0:
        return True, [torch.zeros(0) for _ in tables]
    torch.manual_seed(0)
    given, tokens_BT = torch.randn(8, 2, 64), torch.randint(0, 100, (2, 8))
    outputs = []
    for value in (0.0, 7.0):
        for table in tables:
            table.data.fill_(value)
        model.set_input_tensor(given)
        outputs.append(model(tokens_BT, torch.arange(8).expand(2, -1), None, labels=tokens_BT))
    outputs[-1].sum().backward()
    return torch.equal(*outputs), [table.grad for table in tables]


def test_tables_that_no_layer_of_a_stage_reads_have_a_gradient_all_the_same(gloo):
    """Where gradients are summed while the backward pass runs, a bucket waits for all of its parameters."""
    for same, grads in gloo(2, tables_of_other_stages):
        assert same and grads
        assert all(grad is not None and not grad.any() for grad in grads)


RECOMPUTE = (
    "--recompute-granularity",
    "full",
    "--recompute-method",
    "uniform",
    "--recompute-num-layers",
    "1",
)


def test_recomputing_layers_would_lose_the_first_value(gloo, tmp_path):
    argv = [*ARGUMENTS, "--run-dir", str(tmp_path), "--layer-kinds", "rwkv7,gla,gla,rwkv7", *RECOMPUTE]
    with pytest.raises(ValueError, match=r"^rwkv7 .* full recomputation.*\n  why: .*\n  try: .*selective"):
        gloo(1, train, argv)
    alone = ["--layer-kinds", "rwkv7,gla,gla,gla", "--train-iters", "2"]  # one such layer hands nothing on
    gloo(1, train, [*argv, *alone])
