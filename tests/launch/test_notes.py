"""Notes of the header: variables that are set and do nothing."""

from pathlib import Path

import numpy as np
import pytest

from linear_moe.data.tokenizer import train_tokenizer
from linear_moe.launch.header import header, notes
from tests.data.token_files import write_tokenizer, write_tokens
from tests.launch.plans import make_plan


def idle(**variables: str) -> list[str]:
    return [note for note in notes(make_plan(**variables)) if "does nothing" in note]


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({"HYBRID_OVERRIDE_PATTERN": "M*"}, []),
        ({"HYBRID_OVERRIDE_PATTERN": "M*", "LA_MODULE": "Mamba-2"}, []),
        ({"HYBRID_OVERRIDE_PATTERN": "M*", "LA_MODULE": "gla"}, ["LA_MODULE=gla", "of M* asks"]),
        ({"HYBRID_OVERRIDE_PATTERN": "M*", "LA_MODULE": "gala"}, ["LA_MODULE=gala", "of M* asks"]),
        ({"LAYER_TYPE_LIST": "N", "LA_MODULE": "gla"}, ["LA_MODULE=gla", "of N asks"]),
        ({"LAYER_TYPE_LIST": "LN", "LA_MODULE": "gla"}, []),
        ({"LAYER_TYPE_LIST": "1N", "LA_MODULE": "gla,kda"}, []),
    ],
)
def test_a_mixer_of_no_layer(variables: dict[str, str], found: list[str]):
    told = idle(**variables)
    assert len(told) == bool(found)
    assert all(part in told[0] for part in found)


def test_a_vocabulary_beside_a_tokenizer(tmp_path: Path):
    train_tokenizer(["text"], 258, str(tmp_path / "tok"))
    assert idle(VOCAB_SIZE="5000") == idle(TOKENIZER=str(tmp_path / "tok")) == []
    (note,) = idle(VOCAB_SIZE="5000", TOKENIZER=str(tmp_path / "tok"))
    assert note == "VOCAB_SIZE=5000 does nothing: TOKENIZER has 258 tokens."


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({"USE_GEMM": "false", "ETP": "1", "MOE_AUX_LOSS_COEFF": "0"}, []),
        (
            {
                "MOE": "false",
                "USE_GEMM": "true",
                "MOE_AUX_LOSS_COEFF": "0.01",
                "TRAIN_CAPACITY_FACTOR": "1.25",
            },
            [],
        ),
        ({"MOE": "false", "USE_GEMM": "false"}, ["USE_GEMM=false does nothing: qwen2 tiny has no experts."]),
        ({"MOE": "false", "ETP": "1"}, ["ETP=1 does nothing: qwen2 tiny has no experts."]),
        (
            {"MOE": "false", "MOE_AUX_LOSS_COEFF": "0"},
            ["MOE_AUX_LOSS_COEFF=0 does nothing: qwen2 tiny has no experts."],
        ),
        ({"TOKEN_DROPPING": "true", "TRAIN_CAPACITY_FACTOR": "2"}, []),
        (
            {"TRAIN_CAPACITY_FACTOR": "2"},
            ["TRAIN_CAPACITY_FACTOR=2 does nothing: it is the room of an expert with TOKEN_DROPPING=true."],
        ),
    ],
)
def test_variables_of_experts_that_are_idle(variables: dict[str, str], found: list[str]):
    assert idle(**variables) == found


def test_experts_that_are_not_cut_on_a_cpu():
    """Told where nobody asked for it, and only with both parallel sizes."""
    ranks = {"TP": "2", "GPUS_PER_NODE": "4"}
    for cuda, variables, is_told in (
        (0, {"EP": "2"}, True),
        (0, {}, False),
        (0, {"EP": "2", "TP": "1"}, False),
        (0, {"EP": "2", "ETP": "1"}, False),
        (4, {"EP": "2"}, False),
    ):
        told = [note for note in notes(make_plan(cuda, **ranks | variables)) if note.startswith("ETP is 1")]
        assert len(told) == is_told, variables


def test_how_often_the_data_is_read(tmp_path: Path):
    """10 steps of 8 sequences of 128 over one file and over two; the default budget over 5000 tokens shows."""
    tokenizer = write_tokenizer(tmp_path / "tok")
    one = write_tokens(tmp_path / "one", np.zeros(5000), tokenizer)
    two = write_tokens(tmp_path / "two", np.zeros(2680), tokenizer)
    given = {"TOKENIZER": tokenizer.path}

    def data(path: str, **more: str) -> str:
        rows = header(make_plan(DATASET_PATH=path, **given, **more)).splitlines()
        return next(row for row in rows if row.startswith("data "))

    assert (
        data(one)
        == f"data        {one} = 2.05 epoch(s) of 5.00k tokens, tokenizer {tmp_path}/tok (300 tokens)"
    )
    assert " = 1.33 epoch(s) of 7.68k tokens in total, " in data(f"0.3 {one} 0.7 {two}")
    assert " = 1.33 epoch(s) of 7.68k tokens in total, " in data(f"{one} {two}")
    assert " = 3,000,000 epoch(s) of 5.00k tokens, " in data(one, TRAIN_ITERS="")
    assert " = 1,000 epoch(s) of 5.00k tokens, " in data(one, TRAIN_ITERS="4881"), "not 1e+03"
    assert "epoch" not in data(f"{tmp_path}/none") and "epoch" not in data("mock")
