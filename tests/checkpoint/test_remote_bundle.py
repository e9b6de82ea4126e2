"""The code of an exported folder, as text: what is rewritten, what is chosen, mixers of other people."""

import ast
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from linear_moe import lsm
from linear_moe.checkpoint.remote.bundle import bundle
from linear_moe.checkpoint.remote.describe import PLAIN, hf_config
from linear_moe.checkpoint.remote.names import mixer_rows, model_rows
from tests.contract import outsider


def imports_of(text: str) -> list[str]:
    """Absolute modules that a file imports, in a try or not."""
    nodes = ast.walk(ast.parse(text))
    return [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 0]


def test_a_folder_has_its_own_mixers_only():
    files = bundle(("gla", "mom_rebased"))
    assert {"lsm_gla", "lsm_rebased", "lsm_quadratic", "kernels_chunked_diag", "lsm"} <= set(files)
    assert not {"lsm_kda", "lsm_rwkv7", "lsm_mamba2"} & set(files)
    assert set(bundle(())) < set(files)


def test_only_the_kernels_are_imported_from_the_package():
    files = bundle(tuple(lsm.names()))
    inside = {
        name for name, text in files.items() if any(m.startswith("linear_moe") for m in imports_of(text))
    }
    assert inside == {"kernels"}
    assert not any("triton" in name for name in files)


def test_nothing_but_imports_is_changed():
    files = bundle(("gla", "hgrn2"))
    for name, module in (
        ("lsm_gla", lsm.gla),
        ("lsm_hgrn2", lsm.hgrn2),
        ("lsm_mom", sys.modules["linear_moe.lsm.mom"]),
    ):
        ours, theirs = (ast.parse(text).body for text in (Path(module.__file__).read_text(), files[name]))
        kept = [
            [ast.dump(node) for node in body if not isinstance(node, ast.ImportFrom)]
            for body in (ours, theirs)
        ]
        assert kept[0] == kept[1]


def test_a_mixer_from_elsewhere_comes_along(monkeypatch):
    monkeypatch.setitem(lsm.registry._MIXERS, "outsider", outsider.Outsider)
    files = bundle(("outsider",))
    text = files["lsm_tests_contract_outsider"]
    assert "class Outsider(Mixer):" in text and not any(
        module.startswith("linear_moe") for module in imports_of(text)
    )
    assert "from . import lsm_tests_contract_outsider" in files["lsm"]


@pytest.mark.parametrize("name", lsm.names())
def test_rows_cover_every_tensor_and_give_it_back(name):
    """Filling ours from the exported tensors restores every element."""
    config = lsm.get(name).Config.from_model(hidden_size=256, num_heads=4, head_dim=64, layers_of_kind=2)
    mixer = lsm.get(name)(config)
    for layer in (0, 1):
        rows = mixer_rows(mixer, layer)
        assert len({row.name for row in rows}) == len(rows)
        ours: dict[str, torch.Tensor] = {}
        for key in {row.key for row in rows}:
            parts = [row for row in rows if row.key == key]
            size = sum(torch.Size(row.shape).numel() for row in parts)
            shape = parts[0].shape if parts[0].start is None else (size // 256, 256)
            ours[key] = torch.arange(size, dtype=torch.float64).view(shape)
        again = {key: torch.full_like(x, -1) for key, x in ours.items()}
        for row in rows:
            exported = row.exported(ours[row.key])
            assert exported.shape == row.shape
            row.fill(again[row.key], exported)
        assert all(again[key].equal(x) for key, x in ours.items())
    assert {row.name for row in model_rows(mixer)} == {t.name for t in mixer.all_parameters() if t.per_model}


def test_what_the_exported_model_does_not_know_is_refused_in_one_error():
    plain = {name: values[0] for name, values in PLAIN.items()}
    wrong = plain | {"normalization": "LayerNorm", "add_bias_linear": True, "activation_func": torch.relu}
    wrong |= {"use_mup": True, "moe_router_load_balancing_type": ["aux_loss", "sinkhorn"]}
    config = SimpleNamespace(**wrong, layer_kinds=["softmax"], multi_latent_attention=False)
    model = SimpleNamespace(
        transformer=config, position_embedding_type="none", seq_len_interpolation_factor=None
    )
    with pytest.raises(ValueError) as refused:
        hf_config(model, vocab_size=8, dtype="float32")  # type: ignore[arg-type]
    what, why, instead = str(refused.value).splitlines()
    for text in (
        "normalization='LayerNorm'",
        "add_bias_linear=True",
        "relu",
        "position_embedding_type='none'",
        "use_mup=True",
        "moe_router_load_balancing_type='sinkhorn'",
    ):
        assert text in what
    assert why.startswith("  why: ") and instead.startswith("  try: ")
