"""What cannot be converted is refused with one clear message before anything is written; a stopped one goes on."""

import io
import json
import re
import runpy
import shutil
import struct
import sys
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from tests.checkpoint.hf_models import save_hf
from tests.inference.models import argv
from tests.training.tiny import train


@pytest.fixture(scope="module")
def source(tmp_path_factory, _pool):
    """A Hugging Face folder and a run made of it; tests copy them."""
    folder = tmp_path_factory.mktemp("source")
    _pool.run(1, make, str(folder))
    return folder


def make(rank, world, folder):
    from linear_moe.checkpoint.importing import import_model

    save_hf(f"{folder}/hf", "qwen2_moe", num_experts_per_tok=2)
    import_model(f"{folder}/hf", f"{folder}/run")


def outcome(rank, world, direction, *arguments, **options):
    from linear_moe.checkpoint.exporting import export_model
    from linear_moe.checkpoint.importing import import_model

    try:
        result = {"import": import_model, "export": export_model}[direction](*arguments[:2], **arguments[2])
    except ValueError as error:
        return str(error)
    return " ".join(["no error", *result.warnings])


@pytest.fixture
def refused(gloo, tmp_path):
    """Import or export a folder: the message has these parts, and nothing was written."""

    def check(folder, *parts, direction="import", **options):
        target = tmp_path / "target"
        before = sorted(folder.rglob("*"))
        text = gloo(1, outcome, direction, str(folder), str(target), options)[0]
        for part in (*parts, "\n  why: ", "\n  try: "):
            assert part in text, text
        assert not target.exists() and not target.with_name("target.part").exists()
        assert sorted(folder.rglob("*")) == before

    return check


@pytest.fixture
def folder(source, tmp_path):
    """A copy of the Hugging Face folder."""
    return Path(shutil.copytree(source / "hf", tmp_path / "hf"))


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def header_of(path):
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def change_header(folder, change):
    """Rewrite the header of one file of several tensors; they stay where they are."""
    path = next(path for path in sorted(folder.glob("*.safetensors")) if len(header_of(path)[0]) > 2)
    header, rest = header_of(path)
    change(header, [name for name in header if name != "__metadata__"])
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + rest)
    return path


def test_tensors_in_one_report(folder, refused):
    """Missing, unknown and mis-shaped ones together, by their pattern."""

    def change(header, names):
        header["model.layers.7.surprise.weight"] = header.pop(names[0])
        header[names[1]]["shape"] = [*header[names[1]]["shape"][::-1], 1]

    path = change_header(folder, change)
    (folder / "model.safetensors.index.json").unlink()
    path.rename(folder / "model.safetensors")
    refused(folder, "not known: model.layers.7.surprise.weight", "wrong shape: ", "expected [", "missing: ")
    refused(folder, "model.layers.*.mlp.experts.*.up_proj.weight [32, 64] (8 tensors, the first is ")


def test_damaged_files(folder, refused):
    files = sorted(folder.glob("*.safetensors"))
    data = files[1].read_bytes()
    files[1].write_bytes(data[:-8])
    refused(folder, files[1].name, "is damaged", "its header describes")
    files[1].write_bytes(data[:20])
    refused(folder, "header is cut short")
    files[1].unlink()
    refused(folder, "lacks 1 of its", files[1].name)


def test_unknown_dtypes_and_files(folder, refused, gloo, tmp_path):
    def change(header, names):
        header[names[0]]["dtype"] = "F8_E4M3"

    change_header(folder, change)
    refused(folder, "F8_E4M3", "unquantised")
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    refused(folder, "holds no weights")
    torch.save({"a": torch.ones(2)}, folder / "pytorch_model.bin")
    refused(folder, "pickles only", "--allow-pickle")
    refused(folder, "missing: ", "not known: a [2]", allow_pickle=True)
    torch.save({"a": 2}, folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin cannot be read", "it holds more than tensors", allow_pickle=True)
    (folder / "pytorch_model.bin").write_bytes(b"cut short")
    refused(folder, "pytorch_model.bin cannot be read", allow_pickle=True)


def test_pickles_when_asked_for(source, gloo, tmp_path):
    folder = Path(shutil.copytree(source / "hf", tmp_path / "hf"))
    torch.save(tensors_of(folder), folder / "pytorch_model.bin")
    text = gloo(1, outcome, "import", str(folder), str(tmp_path / "run"), {"allow_pickle": True})[0]
    assert text.startswith("no error") and "no tokenizer" in text
    name = "checkpoint/iter_0000001/__0_0.distcp"
    assert (tmp_path / "run" / name).read_bytes() == (source / "run" / name).read_bytes()


def tensors_of(folder):
    """All of them; the files are removed."""
    import safetensors.torch

    tensors = {}
    for path in folder.glob("*.safetensors*"):
        tensors |= safetensors.torch.load_file(path) if path.suffix == ".safetensors" else {}
        path.unlink()
    return tensors


def test_an_output_layer_that_is_not_the_embedding_is_not_tied(folder, refused, gloo, tmp_path):
    """Transformers leaves the two apart then; where they are equal it ties them."""
    import safetensors.torch

    change_config(folder, tie_word_embeddings=True)
    refused(folder, "has an output layer, lm_head.weight, that is not its embedding")
    tensors = tensors_of(folder)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    assert gloo(1, outcome, "import", str(folder), str(tmp_path / "run"), {})[0].startswith("no error")


def test_one_file_beside_an_index_is_the_model(source, folder, gloo, tmp_path):
    """As transformers reads it: the index may be of weights that were there before."""
    import safetensors.torch

    text = (folder / "model.safetensors.index.json").read_text()
    tensors = {name: tensor + 1 for name, tensor in tensors_of(folder).items()}
    (folder / "model.safetensors.index.json").write_text(text)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    gloo(1, outcome, "import", str(folder), str(tmp_path / "run"), {})
    gloo(1, outcome, "export", str(tmp_path / "run"), str(tmp_path / "back"), {})
    back = tensors_of(tmp_path / "back")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


def test_what_megatron_does_not_build_and_tokens_without_rows(folder, refused, gloo, tmp_path):
    from linear_moe.data.tokenizer import train_tokenizer

    train_tokenizer(["import os\n" * 9], 270, str(folder))
    text = gloo(1, outcome, "import", str(folder), str(tmp_path / "run"), {})[0]
    assert re.search(r"has 26\d tokens and the model 250 rows for them", text), text
    change_config(folder, num_experts_per_tok=1, norm_topk_prob=True)
    refused(folder, "Megatron does not build the model of", "when topk is 1")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"model_type": "bert", "architectures": ["BertModel"]}, ("'bert' (BertModel)", "qwen2_moe")),
        ({"hidden_act": "gelu"}, ("hidden_act = 'gelu'",)),
        ({"use_sliding_window": True, "sliding_window": 64}, ("use_sliding_window",)),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, ("type linear",)),
        ({"dtype": "float8_e4m3fn"}, ("dtype float8_e4m3fn",)),
        ({"num_hidden_layers": 3}, ("missing: model.layers.2.", "expected" if False else "(4 tensors")),
        ({"hidden_size": 128}, ("wrong shape", "expected [128", "found [64")),
    ],
)
def test_configs(folder, refused, changes, parts):
    change_config(folder, **changes)
    refused(folder, *parts)


def test_no_config(folder, refused):
    (folder / "config.json").write_text("{")
    refused(folder, "config.json cannot be read")
    (folder / "config.json").unlink()
    refused(folder, "has no config.json")


def test_patterns(folder, refused):
    refused(folder, "unknown mixer 'glu'", la_module="glu")
    refused(folder, "does not fit 2 layers", la_module="gla", layer_type_list="LLN")
    refused(folder, "--layer-kinds and --la-module", la_module="gla", kinds=["softmax", "softmax"])


def test_an_import_is_its_source_but_for_mixers(folder, refused):
    other = "--extra-args has --norm-epsilon 0.1, which is no option of a mixer"
    refused(folder, other, la_module="gla", extra_args=["--norm-epsilon", "0.1", "--gla-gate-rank", "8"])
    refused(folder, "--gla-gate-rank", la_module="gla", extra_args=["--gla-gate-rank", "x"])


def test_targets(source, refused, gloo, tmp_path):
    target = tmp_path / "there"
    target.mkdir()
    (target / "file").touch()
    for direction, name in (("import", "hf"), ("export", "run")):
        text = gloo(1, outcome, direction, str(source / name), str(target), {})[0]
        assert f"{target} exists" in text and "\n  why: " in text
    assert [path.name for path in target.iterdir()] == ["file"]
    other = tmp_path / "mine.part"
    other.mkdir()
    (other / "file").touch()
    text = gloo(1, outcome, "import", str(source / "hf"), str(tmp_path / "mine"), {})[0]
    assert f"{other} exists, and no conversion has left it\n  why: " in text and (other / "file").exists()


def test_runs_that_are_none(source, refused, tmp_path):
    refused(source / "hf", "is a folder of Hugging Face's already", "the folder as it is", direction="export")
    refused(source / "run", "is a run of linear_moe", f"export --load {source / 'run'} --hf <folder>")
    bare = Path(
        shutil.copytree(source / "run", tmp_path / "bare", ignore=shutil.ignore_patterns("checkpoint"))
    )
    refused(bare, "has no checkpoint", direction="export")
    refused(source, "is neither a run", direction="export")
    refused(source / "run", "no checkpoint of step 9", direction="export", step=9)
    run = Path(shutil.copytree(source / "run", tmp_path / "run"))
    config = json.loads((run / "config.json").read_text())
    (run / "checkpoint" / "iter_0000001" / "__0_0.distcp").write_bytes(b"cut short")
    refused(run, "__0_0.distcp cannot be read: it has 9 bytes", direction="export")
    arguments = config["arguments"]
    arguments[arguments.index("--num-experts") + 1] = "8"
    (run / "config.json").write_text(json.dumps(config))
    wrong = "decoder.layers.*.mlp.experts.experts.linear_fc1.weight expected [8, 64, 64], found [4, 64, 64]"
    refused(run, wrong, direction="export")
    (run / "checkpoint" / "iter_0000001" / ".metadata").unlink()
    refused(run, "cannot be read as a torch_dist checkpoint", direction="export")


def test_what_no_folder_can_hold(gloo, refused, tmp_path):
    """A model with multi-token prediction."""
    run = tmp_path / "run"
    folders = ["--run-dir", str(run), "--save", str(run / "checkpoint"), "--train-iters", "1"]
    folders += ["--lr-warmup-iters", "0", "--mtp-num-layers", "1"]
    gloo(1, train, argv(["softmax"] * 2, *folders, moe=False))
    refused(run, "tensors that cannot be exported", "mtp.", direction="export")


def stopped(rank, world, direction, source, target):
    """A conversion that is stopped after two thirds, and then once more; files that were complete are not redone."""
    from linear_moe.checkpoint import hf_folder, torch_dist
    from linear_moe.checkpoint.exporting import export_model
    from linear_moe.checkpoint.importing import import_model

    torch_dist.FILE_BYTES, before = 50_000, torch_dist.FILE_BYTES
    convert = {
        "import": lambda progress: import_model(source, target, progress=progress),
        "export": lambda progress: export_model(source, target, progress=progress, shard_bytes=50_000),
    }[direction]

    def stop(done, total):
        if done > 2 * total / 3:
            raise KeyboardInterrupt

    with suppress(KeyboardInterrupt):
        convert(stop)
    assert not Path(target).exists()
    part = Path(target + ".part")
    kept = {
        path: path.stat().st_mtime_ns
        for path in part.rglob("*")
        if path.suffix in (".distcp", ".safetensors")
    }
    calls: list[int] = []
    convert(lambda done, total: calls.append(done))
    torch_dist.FILE_BYTES = before
    assert not part.exists() and hf_folder.SHARD_BYTES > 1e9
    again = [Path(target) / path.relative_to(part) for path in kept]
    same = [new.stat().st_mtime_ns == kept[part / new.relative_to(target)] for new in again if new.exists()]
    return (
        sum(same),
        calls == sorted(calls),
        sorted(str(p.relative_to(target)) for p in Path(target).rglob("*")),
    )


@pytest.mark.parametrize("direction", ["import", "export"])
def test_stopped_conversions_go_on(source, gloo, tmp_path, direction):
    name = {"import": "hf", "export": "run"}[direction]
    kept, ordered, files = gloo(1, stopped, direction, str(source / name), str(tmp_path / "target"))[0]
    assert kept >= 2 and ordered
    assert not any(
        file.endswith((".part", ".json.part", "conversion.json", ".distcp.json")) for file in files
    )
    back = tmp_path / "target"
    if direction == "import":
        assert gloo(1, outcome, "export", str(back), str(tmp_path / "hf"), {})[0].startswith("no error")
        back = tmp_path / "hf"
    import safetensors.torch

    tensors = [
        {k: v for path in folder.glob("*.safetensors") for k, v in safetensors.torch.load_file(path).items()}
        for folder in (back, source / "hf")
    ]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][key], value) for key, value in tensors[1].items())


def resumed_with_other_shards(rank, world, source, target):
    """An export that is stopped, and goes on with files of another size, as many; names of tensors by file."""
    from linear_moe.checkpoint import exporting, hf_folder

    def stop(done, total):
        if done > 2 * total / 3:
            raise KeyboardInterrupt

    groups, plan = {}, exporting.shards
    with patch.object(exporting, "shards", lambda *args: groups.setdefault(args[1], plan(*args))):
        for size in range(50_000, 60_000, 500):
            with suppress(KeyboardInterrupt):
                exporting.export_model(source, target, progress=stop, shard_bytes=size)
            if groups[size].keys() == groups[50_000].keys() and groups[size] != groups[50_000]:
                break
        assert groups[size] != groups[50_000]
        with suppress(KeyboardInterrupt):
            exporting.export_model(source, target, progress=stop, shard_bytes=50_000)
        exporting.export_model(source, target, shard_bytes=size)
    headers = {
        path.name: list(hf_folder._safetensors_header(path)) for path in Path(target).glob("*.safetensors")
    }
    return headers == groups[size]


def test_files_of_another_plan_are_not_kept(source, gloo, tmp_path):
    assert gloo(1, resumed_with_other_shards, str(source / "run"), str(tmp_path / "target"))[0]


def tool(rank, world, *arguments):
    """``tools/convert.py`` as from the command line: exit code, output, errors."""
    out, err = io.StringIO(), io.StringIO()
    script = Path(__file__).parents[2] / "tools" / "convert.py"
    with patch.object(sys, "argv", [str(script), *arguments]), redirect_stdout(out), redirect_stderr(err):
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as end:
            return end.code, out.getvalue(), err.getvalue()


def test_the_tool(source, gloo, tmp_path):
    arguments = ["import", "--hf", str(source / "hf"), "--save", str(tmp_path / "run"), "--la-module", "gla"]
    code, out, err = gloo(1, tool, *arguments)[0]
    assert code == 0, err
    assert "q = model.layers.*.self_attn.q_proj.weight" in out and "layers L" in out
    assert "has no tokenizer that we can read" in err
    code, _, err = gloo(1, tool, "export", "--load", str(tmp_path / "run"), "--hf", str(source / "hf"))[0]
    assert code == 2 and err.startswith("linear_moe: ") and "exists\n  why: " in err
    code, out, _ = gloo(1, tool, "export", "--load", str(tmp_path / "run"), "--hf", str(tmp_path / "hf"))[0]
    assert code == 0 and "trust_remote_code=True" in out
    arguments = ["import", "--hf", str(tmp_path / "hf"), "--save", str(tmp_path / "back")]
    code, out, _ = gloo(1, tool, *arguments)[0]
    first, last = out.splitlines()  # as it is: no table
    assert code == 0 and re.fullmatch(r"tensors: [1-9]\d+ carried, 0 started", first) and "layers L" in last


def test_the_tool_names_its_options(source, gloo, tmp_path):
    for size in ("-1", "0", "nan", "inf"):
        folders = ["--load", str(source / "run"), "--hf", str(tmp_path / "hf")]
        code, _, err = gloo(1, tool, "export", *folders, "--shard-gb", size)[0]
        assert code == 2 and err.startswith(f"linear_moe: --shard-gb is {size}\n  why: "), err
    arguments = ["import", "--hf", str(source / "hf"), "--save", str(tmp_path / "run")]
    code, _, err = gloo(1, tool, *arguments, "--la-module", "glaa")[0]
    assert code == 2 and err.endswith("try: --la-module gla\n"), err
    code, _, err = gloo(1, tool, *arguments, "--la-module", "gla", "--layer-type-list", "LLL")[0]
    assert code == 2 and "linear_moe: --layer-type-list LLL (3 symbols) does not fit" in err
    assert "try: --layer-type-list 'L" in err and "LAYER_TYPE_LIST" not in err
