"""What an import that was stopped has left: used for the same model alone; and what a long one holds while it runs."""

from contextlib import suppress
from pathlib import Path
from unittest.mock import patch

import torch

from tests.checkpoint.hf_models import save_hf


def with_another_pattern(rank, world, folder):
    """An import of ``LN`` that is stopped, then one of ``NL`` into the same folder, and the same one undisturbed."""
    from linear_moe.checkpoint import torch_dist
    from linear_moe.checkpoint.importing import import_model

    def stop(done, total):
        if done > 2 * total / 3:
            raise KeyboardInterrupt

    save_hf(folder / "hf", "qwen2")
    with patch.object(torch_dist, "FILE_BYTES", 50_000):
        with suppress(KeyboardInterrupt):
            import_model(folder / "hf", folder / "run", la_module="gla", layer_type_list="LN", progress=stop)
        left = len(list((folder / "run.part").rglob("*.distcp.json")))
        found = []
        for target in ("run", "other"):
            done = import_model(folder / "hf", folder / target, la_module="gla", layer_type_list="NL")
            reader = torch_dist.Reader(folder / target / "checkpoint" / "iter_0000001")
            carried = {o.pattern for o in done.origins if o.how == "carried"}
            assert any("linear_qkv" in pattern for pattern in carried)
            found.append({key: reader.read(key) for key in reader.tensors if "low_rank" not in key})
    return left, [key for key, tensor in found[1].items() if not torch.equal(found[0][key], tensor)]


def test_files_of_another_model_are_not_kept(gloo, tmp_path: Path):
    """Its tensors have the same names and shapes, but for the layer that they are of."""
    left, wrong = gloo(1, with_another_pattern, tmp_path)[0]
    assert left >= 2 and wrong == []


def started(rank, world, folder):
    """How many layers' new tensors are in memory when each piece is made; and how many pieces and layers there are."""
    from linear_moe.checkpoint import linearise
    from linear_moe.checkpoint.importing import import_model

    layers: list[linearise._Started] = []
    held: list[int] = []
    make, tensor = linearise._Started.__init__, linearise._Started.tensor

    def made(self, *args):
        make(self, *args)
        layers.append(self)

    def counted(self, name):
        found = tensor(self, name)
        held.append(sum(layer.fresh is not None for layer in layers))
        return found

    save_hf(folder / "hf", "qwen2", num_hidden_layers=4)
    with patch.multiple(linearise._Started, __init__=made, tensor=counted):
        import_model(folder / "hf", folder / "run", la_module="gated_deltanet", layer_type_list="L")
    return held, len(layers)


def test_one_new_layer_is_in_memory_at_a_time(gloo, tmp_path: Path):
    held, layers = gloo(1, started, tmp_path)[0]
    assert layers == 4 and len(held) > 20
    assert max(held) == 1 and held[-1] == 0
