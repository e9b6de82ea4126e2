"""Conversions hold about one tensor at a time, whatever the model's size: less than 1.3 times the largest file."""

import json
import struct
from pathlib import Path
from typing import Any

from tests.checkpoint.hf_models import VOCAB


def write_empty_model(folder: Path, shard_bytes: int, **sizes: Any) -> int:
    """A Qwen2 model of zeros that takes no disk: files with holes in place of tensors. Size of the largest one."""
    import torch

    from linear_moe.checkpoint.blueprint import blueprint
    from linear_moe.checkpoint.hf_config import describe
    from linear_moe.checkpoint.hf_folder import NAMES, Planned, shards, write_index
    from linear_moe.checkpoint.native import native_config
    from linear_moe.checkpoint.options import model_arguments
    from linear_moe.checkpoint.tables import rows

    config = {"model_type": "qwen2", "tie_word_embeddings": False, "rms_norm_eps": 1e-6, "dtype": "bfloat16"}
    config |= {"max_position_embeddings": 4096, "rope_theta": 1e6, "vocab_size": VOCAB, **sizes}
    described = describe(config)
    kinds = ("softmax",) * described.size.num_layers
    argv = [*model_arguments(described, kinds), "--tokenizer-type", "NullTokenizer", "--vocab-size", "9"]
    padded = -(-config["vocab_size"] // 128) * 128
    model = blueprint(argv, padded_vocab_size=padded)
    table, _ = rows("qwen2", model.shape(config["vocab_size"]), model.tensors)
    tensors = {}
    for row in table:
        parts = row.transform.to_theirs(torch.empty(model.tensors[row.key], device="meta"))
        tensors |= {n: Planned(torch.bfloat16, tuple(p.shape)) for n, p in zip(row.names, parts, strict=True)}
    folder.mkdir(parents=True)
    full = native_config("qwen2", described.family, described.size, dtype="bfloat16")
    (folder / "config.json").write_text(json.dumps(full))
    files = shards(tensors, shard_bytes)
    for name, group in files.items():
        header, offset = {}, 0
        for tensor in group:
            planned = tensors[tensor]
            span = [offset, offset + planned.size]
            header[tensor] = {"dtype": NAMES[planned.dtype], "shape": planned.shape, "data_offsets": span}
            offset += planned.size
        text = json.dumps(header).encode()
        with open(folder / name, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + offset)
    write_index(folder, files, tensors)
    return max((folder / name).stat().st_size for name in files)


def memory() -> dict[str, int]:
    """Memory of this process, now and at most, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {name: int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM")}


def peak(rank, world, folder, shard_bytes, sizes):
    """Most memory above that of before, of an import and an export, and the size of the largest file."""
    from linear_moe.checkpoint.exporting import export_model
    from linear_moe.checkpoint.importing import import_model

    source, run = Path(folder) / "hf", Path(folder) / "run"
    largest = write_empty_model(source, shard_bytes, **sizes)
    peaks = []
    for convert in (
        lambda: import_model(source, run),
        lambda: export_model(run, Path(folder) / "back", shard_bytes=shard_bytes),
    ):
        Path("/proc/self/clear_refs").write_text("5")  # start measuring the peak anew
        before = memory()["VmRSS"]
        convert()
        peaks.append(memory()["VmHWM"] - before)
    return largest, *peaks


def test_peak_memory(gloo, tmp_path):
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 16}
    sizes |= {"num_attention_heads": 12, "num_key_value_heads": 4, "vocab_size": 8000}
    largest, imported, exported = gloo(1, peak, str(tmp_path), 60_000_000, sizes)[0]
    total = sum(path.stat().st_size for path in (tmp_path / "run").rglob("*.distcp"))
    assert total > 4 * largest > 200_000_000
    assert imported < 1.3 * largest, imported / largest
    assert exported < 1.3 * largest, exported / largest


def of_a_pickle(rank, world, folder):
    """Most memory above that of before, of finding the tensors of a large pickle and of reading its smallest."""
    import torch

    from linear_moe.checkpoint.hf_folder import stored_tensors

    path = Path(folder) / "pytorch_model.bin"
    torch.save({"large": torch.zeros(15_000_000), "small": torch.arange(10.0)}, path)
    Path("/proc/self/clear_refs").write_text("5")
    before = memory()["VmRSS"]
    small = stored_tensors(Path(folder), allow_pickle=True)["small"].read("small")
    return small.tolist(), memory()["VmHWM"] - before


def test_a_pickle_is_not_read_whole(gloo, tmp_path):
    small, peak = gloo(1, of_a_pickle, str(tmp_path))[0]
    assert small == list(range(10))
    assert (tmp_path / "pytorch_model.bin").stat().st_size > 60_000_000 and peak < 20_000_000
