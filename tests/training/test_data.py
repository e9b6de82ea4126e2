"""The micro-batch of each rank: read, cut, packed, and what of it is in the loss."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from linear_moe.data.tokenizer import train_tokenizer
from linear_moe.training.data import documents, trim_boundaries
from tests.training.tiny import ARGUMENTS
from tests.workers import with_model_parallel

LENGTH = 24
SMALL = [*ARGUMENTS, "--layer-kinds", "gla,gla,gla,softmax", "--seq-length", str(LENGTH)]
PACK = ["--dataloader-inter-document-masking"]
CU_SEQLENS = [[0, 3, 4, 24], [0, 24], [0, 11, 24]]
"""Document boundaries of three sequences."""


def boundaries() -> Tensor:
    """As the dataset gives them: padded with the length to one more column than there are tokens."""
    padded = [row + [LENGTH] * (LENGTH + 1 - len(row)) for row in CU_SEQLENS]
    return torch.tensor(padded, dtype=torch.int32)


def sample() -> dict[str, Tensor]:
    """A micro-batch as the loader gives it."""
    tokens = torch.arange(3 * LENGTH).view(3, LENGTH)
    mask = torch.ones(3, LENGTH)
    mask[1, 5] = 0
    return {
        "tokens": tokens,
        "labels": tokens + 1000,
        "loss_mask": mask,
        "position_ids": torch.arange(LENGTH).expand(3, -1).clone(),
        "cu_seqlens": boundaries(),
        "max_seqlen": torch.tensor([20, 24, 13]),
    }


def received(rank: int, world: int, argv: list[str], tp: int, pp: int, cp: int) -> list[dict[str, Any]]:
    """Two micro-batches of this rank, from a loader where the stage has one."""
    import megatron.training.training as training
    from megatron.core import mpu

    from linear_moe.training.data import get_batch, needs_data
    from linear_moe.training.pretrain import prepare_arguments

    sizes = {"--tensor-model-parallel-size": tp, "--pipeline-model-parallel-size": pp}
    sizes["--context-parallel-size"] = cp
    args = prepare_arguments([*SMALL, *(str(x) for pair in sizes.items() for x in pair), *argv])
    with with_model_parallel(tp=tp, pp=pp, cp=cp):
        training.consume_seqlen_stats_in_iteration()
        iterator = iter([sample(), sample()]) if needs_data(args) else None
        found = []
        for _ in range(2):
            batch = get_batch(iterator)
            found.append({**vars(batch), "packed_seq_params": _boundaries_of(batch.packed_seq_params)})
        place = {"tp": mpu.get_tensor_model_parallel_rank(), "cp": mpu.get_context_parallel_rank()}
        place |= {"pp": mpu.get_pipeline_model_parallel_rank(), "left": len(list(iterator or ()))}
        stats = training.consume_seqlen_stats_in_iteration()
        return [*found, place, stats]


def _boundaries_of(params: Any) -> Any:
    if params is None:
        return None
    assert params.qkv_format == "sbhd" and params.cu_seqlens_q is params.cu_seqlens_kv
    assert params.max_seqlen_q == params.max_seqlen_kv == LENGTH
    return params.cu_seqlens_q


FIELDS = ("tokens", "labels", "loss_mask", "position_ids")


@pytest.mark.parametrize("pack", [[], PACK], ids=["plain", "packed"])
def test_tensor_parallel_ranks_get_the_same(gloo, pack):
    for *batches, _, _ in gloo(2, received, pack, 2, 1, 1):
        for batch in batches:
            assert all(torch.equal(batch[name], sample()[name]) for name in FIELDS)
            assert (batch["packed_seq_params"] is not None) == bool(pack)


@pytest.mark.parametrize("pack", [[], PACK], ids=["plain", "packed"])
def test_context_parallel_ranks_get_their_chunks(gloo, pack):
    """Chunks 0 and 3 of 4, and 1 and 2; boundaries stay those of the whole sequences."""
    for *batches, place, _ in gloo(2, received, pack, 1, 1, 2):
        chunks = {0: (0, 3), 1: (1, 2)}[place["cp"]]
        for batch in batches:
            for name in FIELDS:
                whole = sample()[name].chunk(4, dim=1)
                assert torch.equal(batch[name], torch.cat([whole[c] for c in chunks], 1)), name
            if pack:
                assert batch["packed_seq_params"].tolist() == trim_boundaries(boundaries()).tolist()


@pytest.mark.parametrize("pack", [[], PACK], ids=["plain", "packed"])
def test_pipeline_stages_get_what_they_look_at(gloo, pack):
    """The first and the last stage; those between only with packing, since their layers read the boundaries."""
    for *batches, place, _ in gloo(4, received, pack, 1, 4, 1):
        for batch in batches:
            if place["pp"] in (0, 3) or pack:
                assert all(torch.equal(batch[name], sample()[name]) for name in FIELDS)
            else:
                assert all(batch[name] is None for name in FIELDS)
            assert (batch["packed_seq_params"] is not None) == bool(pack)
        assert place["left"] == 0


def test_packed_boundaries(gloo):
    """On every rank of TP2 x CP2: whole sequences, no column that none of them needs, int32; and the FLOPs' sums."""
    for *batches, _, stats in gloo(4, received, PACK, 2, 1, 2):
        for batch in batches:
            cu_seqlens = batch["packed_seq_params"]
            assert cu_seqlens.dtype == torch.int32
            assert cu_seqlens.tolist() == [[0, 3, 4, 24], [0, 24, 24, 24], [0, 11, 24, 24]]
        squares = sum((b - a) ** 2 for row in CU_SEQLENS for a, b in itertools.pairwise(row))
        assert stats == (2 * 3 * LENGTH, 2 * squares)


def test_layers_see_the_documents():
    """The layout of the layers, from what the batch carries: tokens see their own document and no other."""
    from linear_moe.model.sequence import layout_of

    params = documents(trim_boundaries(boundaries()), LENGTH)
    layout = layout_of(params, batch=3, local_length=LENGTH, cp_group=None)
    for b, row in enumerate(CU_SEQLENS):
        owner = [sum(t >= start for start in row) for t in range(LENGTH)]
        ids = layout.document_ids_BS[b].tolist()
        assert all((ids[s] == ids[t]) == (owner[s] == owner[t]) for s in range(LENGTH) for t in range(LENGTH))
    rows = layout.run_cu_seqlens.diff().reshape(3, -1)
    assert [[n for n in row if n] for row in rows.tolist()] == [[3, 1, 20], [24], [11, 13]]
    assert documents(None, LENGTH) is None


@pytest.mark.parametrize("rows", [CU_SEQLENS, [[0, 24]] * 3, [list(range(25))] * 3])
def test_trimming_keeps_every_document(rows):
    padded = torch.tensor([row + [LENGTH] * (LENGTH + 1 - len(row)) for row in rows], dtype=torch.int32)
    trimmed = trim_boundaries(padded)
    assert trimmed.shape[1] == max(map(len, rows))
    assert [sorted(set(row)) for row in trimmed.tolist()] == [sorted(set(row)) for row in rows]


def loaded(rank: int, world: int, argv: list[str], count: int, done: int = 0) -> dict[str, Any]:
    """The batches of the training set behind ``done`` steps, as Megatron's loader gives them."""
    from megatron.training import get_tokenizer
    from megatron.training.training import build_train_valid_test_data_iterators

    from linear_moe.training.data import get_batch, train_valid_test_datasets
    from linear_moe.training.pretrain import prepare_arguments

    args = prepare_arguments([*argv, "--micro-batch-size", "2"])
    args.iteration = done
    args.consumed_train_samples = done * args.global_batch_size
    args.consumed_valid_samples = 0
    with with_model_parallel(tp=world):
        train, _, _ = build_train_valid_test_data_iterators(train_valid_test_datasets)
        assert train is not None
        batches = [get_batch(train) for _ in range(count)]
        tokenizer = get_tokenizer()
        return {
            "batches": [
                {**vars(b), "packed_seq_params": _boundaries_of(b.packed_seq_params)} for b in batches
            ],
            "eod": tokenizer.eod,
            "pad": tokenizer.pad,
        }


@pytest.mark.parametrize("pack", [[], PACK], ids=["plain", "packed"])
def test_mock_data_needs_no_file(gloo, tmp_path, pack):
    ranks = gloo(2, loaded, [*SMALL, "--tensor-model-parallel-size", "2", *pack], 2)
    for first, second in zip(ranks[0]["batches"], ranks[1]["batches"], strict=True):
        for name in FIELDS:
            assert first[name].shape == (2, LENGTH) and torch.equal(first[name], second[name])
        assert torch.equal(first["tokens"][:, 1:], first["labels"][:, :-1])
        assert first["tokens"].min() >= 0 and first["tokens"].max() < 128
        if pack:
            assert torch.equal(first["packed_seq_params"], second["packed_seq_params"])


@pytest.fixture(scope="module", params=["own padding token", "padding is the end token"])
def corpus(request, tmp_path_factory) -> tuple[str, str, list[list[int]], bool]:
    """A tokenizer, token files and their documents; base models of Qwen2 pad with their end-of-document token."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    folder: Path = tmp_path_factory.mktemp("corpus")
    info = train_tokenizer(["one two three four five six seven"] * 3, 270, str(folder / "tokenizer"))
    config = folder / "tokenizer" / "tokenizer_config.json"
    if request.param != "own padding token":
        content = json.loads(config.read_text())
        config.write_text(json.dumps(content | {"pad_token": content["eos_token"]}))
    generator = np.random.default_rng(0)
    texts = [generator.integers(10, 250, size=n).tolist() for n in generator.integers(1, 15, size=60)]
    builder = IndexedDatasetBuilder(str(folder / "tokens.bin"), dtype=DType.optimal_dtype(info.vocab_size))
    for text in texts:
        builder.add_document([*text, info.eod], [len(text) + 1])
    builder.finalize(str(folder / "tokens.idx"))
    return str(folder / "tokenizer"), str(folder / "tokens"), texts, request.param != "own padding token"


def from_files(gloo: Any, corpus: Any, *extra: str, done: int = 0) -> tuple[list[dict[str, Any]], int]:
    tokenizer, prefix, _, is_ambiguous = corpus
    argv = [flag for flag in SMALL if flag != "--mock-data"]
    argv += [
        "--tokenizer-type",
        "HuggingFaceTokenizer",
        "--tokenizer-model",
        tokenizer,
        "--data-path",
        prefix,
    ]
    argv += ["--vocab-size", "270", "--padded-vocab-size", "384", "--train-iters", "8", "--split", "1,0,0"]
    (found,) = gloo(1, loaded, [*argv, *extra], 0 if done else 6, done)
    assert (found["pad"] == found["eod"]) == is_ambiguous
    return found["batches"], found["eod"]


def test_the_end_of_a_document_is_learned(gloo, corpus):
    """Labels that end a document stay in the loss, whatever the tokenizer pads with (defect D14 of the old system)."""
    batches, eod = from_files(gloo, corpus)
    ends = 0
    for batch in batches:
        assert (batch["loss_mask"] == 1).all()
        ends += int((batch["labels"] == eod).sum())
        assert torch.equal(batch["tokens"][:, 1:], batch["labels"][:, :-1])
    assert ends > 20


def test_masking_ends_is_a_choice(gloo, corpus):
    """``--eod-mask-loss`` drops what follows the end of a document, never the end itself."""
    batches, eod = from_files(gloo, corpus, "--eod-mask-loss")
    for batch in batches:
        assert torch.equal(batch["loss_mask"] == 0, batch["tokens"] == eod)


@pytest.mark.parametrize("done", [0, 8, 20], ids=["new", "finished", "longer before"])
def test_a_blend_is_as_long_as_its_run(gloo, corpus, done):
    """It has just what is asked for, so that Megatron's sampler refuses a run that has ended, and EVAL_ITERS=0."""
    blend = ("0.3", corpus[1], "0.7", corpus[1])
    batches, _ = from_files(gloo, corpus, "--data-path", *blend, "--split", "9,1,0", done=done)
    assert len(batches) == (0 if done else 6)


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({}, [800, 480, 80]),
        ({"iteration": 40, "consumed_train_samples": 320, "consumed_valid_samples": 160}, [800, 480, 80]),
        ({"iteration": 100, "consumed_train_samples": 800, "consumed_valid_samples": 400}, [808, 480, 80]),
        ({"iteration": 130, "consumed_train_samples": 1040, "consumed_valid_samples": 0}, [1048, 480, 80]),
        ({"iteration": 40, "consumed_train_samples": 640, "consumed_valid_samples": 800}, [1120, 1120, 80]),
    ],
    ids=["new", "resumed", "finished", "longer before", "other batch and evaluations before"],
)
def test_a_resumed_run_has_enough_samples(changed: dict[str, int], found: list[int]):
    """100 steps of 8 sequences, 10 batches evaluated after each 20 and at the end."""
    from argparse import Namespace

    from linear_moe.training.data import enough_samples

    args = Namespace(train_iters=100, global_batch_size=8, eval_interval=20, iteration=0)
    args.consumed_train_samples = args.consumed_valid_samples = 0
    vars(args).update(changed)
    assert enough_samples(args, [800, 480, 80]) == found
    assert enough_samples(args, [800, 0, 0])[1:] == [0, 0]


def test_boundaries_follow_the_ends(gloo, corpus):
    """Of packed token files: a document ends with its end token, and positions count from its start."""
    batches, eod = from_files(gloo, corpus, *PACK)
    texts = {tuple(text) for text in corpus[2]}
    whole = 0
    for batch in batches:
        for tokens, row, positions in zip(
            batch["tokens"], batch["packed_seq_params"], batch["position_ids"], strict=True
        ):
            bounds = sorted(set(row.tolist()))
            assert bounds[0] == 0 and bounds[-1] == LENGTH
            assert [t + 1 for t in range(LENGTH - 1) if tokens[t] == eod] == bounds[1:-1]
            for start, end in itertools.pairwise(bounds):
                assert positions[start:end].tolist() == list(range(end - start))
                if start > 0 and end < LENGTH:
                    assert tuple(tokens[start : end - 1].tolist()) in texts
                    whole += 1
        assert (batch["loss_mask"][batch["labels"] == eod] == 1).all()
    assert whole > 5


def stages(rank: int, world: int) -> list[list[bool]]:
    """Which of this rank's parts of an interleaved pipeline read data; with documents, and as one whole rank."""
    from argparse import Namespace

    from linear_moe.training.data import needs_data

    with with_model_parallel(pp=2, vpp=2):
        found = []
        for packed in (False, True):
            args = Namespace(dataloader_inter_document_masking=packed)
            found.append([needs_data(args, stage) for stage in (0, 1, None)])
        return found


def test_parts_of_an_interleaved_pipeline(gloo):
    """The first part of the first rank and the last of the last; told of no part, a rank answers for all it has."""
    assert gloo(2, stages) == [[[True, False, True], [True] * 3], [[False, True, True], [True] * 3]]


def test_the_dataset_is_what_the_arguments_say(monkeypatch):
    """Every field by the name that Megatron gives it; where the names differ, as listed."""
    import dataclasses
    from argparse import Namespace

    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

    from linear_moe.training import data

    other = {"random_seed": "seed", "sequence_length": "seq_length", "path_to_cache": "data_cache_path"}
    other |= {"inter_document_masking": "dataloader_inter_document_masking"}
    names = {field.name for field in dataclasses.fields(GPTDatasetConfig)}
    args = Namespace(**{name: f"value of {name}" for name in (names - set(other)) | set(other.values())})
    monkeypatch.setattr(data, "GPTDatasetConfig", lambda **fields: fields)
    monkeypatch.setattr(data, "get_tokenizer", lambda: "the tokenizer")
    monkeypatch.setattr(data, "get_blend_and_blend_per_split", lambda args: ("the blend", "by split"))
    found = data.dataset_config(args)
    own = {"blend": "the blend", "blend_per_split": "by split", "tokenizer": "the tokenizer"}
    own["create_attention_mask"] = False  # of [S, S], which no layer reads
    assert {name: found.pop(name) for name in own} == own
    assert found == {name: f"value of {other.get(name, name)}" for name in found}
    asked = {
        "split",
        "num_dataset_builder_threads",
        "mmap_bin_files",
        "reset_position_ids",
        "reset_attention_mask",
    }
    assert found.keys() == {*other, *asked, "eod_mask_loss", "mid_level_dataset_surplus"}
