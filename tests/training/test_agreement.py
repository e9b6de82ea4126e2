"""What is told of processes that were started with other variables, and that folders may differ between nodes."""

import re

import pytest
import torch.distributed as dist

from linear_moe.training.agreement import check_same_arguments


@pytest.fixture
def told(monkeypatch):
    """``told(line, line, ..)``: what processes of these command lines are told of the first that differs."""

    def told(*lines: str) -> str:
        def gather(everyone: list, mine: list[str]) -> None:
            # What a process sends is what the one that asks would send of the same line.
            everyone[:] = [[word.rsplit("/", 1)[-1] for word in line.split()] for line in lines]
            assert mine in everyone

        monkeypatch.setattr(dist, "get_world_size", lambda: len(lines))
        monkeypatch.setattr(dist, "all_gather_object", gather)
        texts = set()
        for line in lines:
            try:
                check_same_arguments(line.split())
                texts.add("")
            except ValueError as error:
                assert re.fullmatch(r"[^\n]+\n  why: [^\n]+\n  try: [^\n]+", str(error))
                texts.add(str(error).splitlines()[0])
        (text,) = texts  # every process says the same
        return text

    return told


@pytest.mark.parametrize(
    ("first", "second", "differences"),
    [
        ("--lr 1 --bf16", "--lr 2 --bf16", "--lr: 1 -> 2"),
        ("--lr 1 --bf16", "--lr 1", "--bf16: on -> not set"),
        ("--lr 1", "--bf16 --lr 1", "--bf16: not set -> on"),
        ("--betas 1 2 --lr 1", "--betas 1 3 --lr 1", "--betas: 1 2 -> 1 3"),
        ("--load /a/old", "--load /a/new", "--load: old -> new"),
        # Of two flags that undo each other the last counts.
        ("--x --no-x", "--no-x --x", "the order of flags"),
    ],
)
def test_every_difference_has_its_name(told, first, second, differences):
    for line in (first, second):
        assert told(line, line, line) == ""
    for same in range(1, 3):
        assert told(*[first] * same, second, second) == (
            f"process {same} was started with other variables than process 0: {differences}"
        )


def test_folders_are_those_of_a_node(told):
    assert told("--load /disk1/run --lr 1", "--load /disk2/run --lr 1") == ""


def test_a_long_list_is_cut(told):
    many = " ".join(f"--flag{i} 1" for i in range(1000))
    assert len(told("--lr 1", f"--lr 1 {many}")) < 500
