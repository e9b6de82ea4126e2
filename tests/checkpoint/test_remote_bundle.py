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
from linear_moe.checkpoint.remote.names import mixer_rows
from linear_moe.checkpoint.tables import Shape
from linear_moe.checkpoint.tables import rows as table_rows
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
    """The names of a layer are different ones, and what goes there comes back, every element."""
    config = lsm.get(name).Config.from_model(hidden_size=256, num_heads=4, head_dim=64, layers_of_kind=2)
    mixer = lsm.get(name)(config)
    model = Shape((name, name), {name: mixer}, groups=1, channels=1, vocab_size=1, padded_vocab_size=1)
    shared = [p.name for p in mixer.all_parameters() if p.per_model]
    for layer in (0, 1):
        rows = mixer_rows(mixer, layer)
        assert len({row.name for row in rows}) == len(rows)
        sizes = {f"{name}_tables.{table}": (3, 5) for table in shared}
        for key in {row.key for row in rows}:
            stops = [row.stop for row in rows if row.key == key and row.stop is not None]
            groups = next(row.groups for row in rows if row.key == key)
            size = (groups * max(stops), 256) if stops else (3, 5)
            sizes[f"decoder.layers.{layer}.self_attention.{key}"] = size
        table, unknown = table_rows("linear_moe", model, sizes)
        assert not unknown and {row.key for row in table} == sizes.keys()
        assert sum(len(row.names) for row in table) == len(rows) + len(shared)
        for row in table:
            ours = torch.arange(torch.Size(sizes[row.key]).numel()).view(sizes[row.key])
            theirs = row.transform.to_theirs(ours)
            assert len(theirs) == len(row.names) and sum(x.numel() for x in theirs) == ours.numel()
            assert row.transform.to_ours(theirs).equal(ours)


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
