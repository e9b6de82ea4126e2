"""Sequences of packed samples token by token, the slots of a run and of its evaluations, and what padding is."""

from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from linear_moe.data.instructions.packing import Schedule
from linear_moe.data.instructions.prepare import Prepared
from linear_moe.data.instructions.tokens import Sample
from linear_moe.training import finetune
from tests.finetune.chat import chat_tokenizer, mixed_messages, prepared, write_lines


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp("samples")
    lines = write_lines(folder / "lines.jsonl", mixed_messages(12))
    return prepared(chat_tokenizer(folder / "tok"), lines, folder / "cache", 128)


def test_a_sequence_token_by_token():
    """Position t reads a token and predicts the next of the same sample; it counts if that one is learned."""
    parts = [([5, 6, 7, 8], [0, 0, 1, 1]), ([9, 3], [1, 1]), ([4, 2, 1], [1, 0, 1])]
    made = [Sample(np.asarray(tokens, np.int32), np.asarray(learned, bool)) for tokens, learned in parts]
    found = finetune.sequence(made, 8)
    assert found["tokens"].tolist() == [5, 6, 7, 9, 4, 2, 0, 0]
    assert found["labels"].tolist() == [6, 7, 8, 3, 2, 1, 0, 0]
    assert found["loss_mask"].tolist() == [0, 1, 1, 1, 0, 1, 0, 0]
    assert found["position_ids"].tolist() == [0, 1, 2, 0, 0, 1, 0, 0]
    assert found["cu_seqlens"].tolist() == [0, 3, 4, 6, 8, 8, 8, 8, 8] and found["num_tokens"] == 6
    kinds = {name: str(value.dtype) for name, value in found.items()}
    assert kinds == dict.fromkeys(("tokens", "labels", "position_ids", "num_tokens"), "int64") | {
        "loss_mask": "float32",
        "cu_seqlens": "int32",
    }
    full = finetune.sequence(made[:1], 3)
    assert full["cu_seqlens"].tolist() == [0, 3, 3, 3] and full["num_tokens"] == 3


def test_an_empty_sequence_has_nothing_to_learn():
    """One token counts for the balance of experts, which would be a mean over none."""
    found = finetune.sequence([], 4)
    assert not found["loss_mask"].any() and found["num_tokens"] == 1
    assert found["cu_seqlens"].tolist() == [0, 4, 4, 4, 4]


def test_slots_follow_the_schedule(samples: Prepared):
    """Read in any order, over the border of epochs, which have packs that are missing to a whole step."""
    packs = [[0, 1], [2], [3], [4, 5, 6], [7]]
    schedule = Schedule(len(packs), 2, seed=9)
    data = finetune.InstructionDataset(samples, packs, schedule, 128, slots=14)
    assert len(data) == 14
    for slot in (0, 13, 7, 5, 6, 11, 2):
        epoch, place = divmod(slot, 6)
        order = np.random.default_rng([9, 1 + epoch]).permutation(5)
        pack = [] if place == 5 else packs[order[place]]
        expected = finetune.sequence([samples.sample(i) for i in pack], 128)
        found = data[slot]
        assert all(np.array_equal(found[name], expected[name]) for name in expected), slot


def arguments(samples: Prepared, **changes: Any) -> Namespace:
    options: dict[str, Any] = {"seq_length": 128, "global_batch_size": 4, "train_iters": 10, "seed": 3}
    options |= {"consumed_train_samples": 0, "consumed_valid_samples": 0, "eval_iters": 2, "eval_interval": 5}
    options |= {"instruction_data": str(samples.folder), "valid_instruction_data": str(samples.folder)}
    return Namespace(**options | {"no_instruction_packing": False} | changes)


@pytest.mark.parametrize(
    ("changes", "train_slots", "valid_slots"),
    [
        ({}, 44, 4 * 2 * 4),
        ({"consumed_train_samples": 60, "consumed_valid_samples": 24}, 64, 24 + 32),
        ({"train_iters": 12, "eval_interval": 4, "eval_iters": 3}, 52, 5 * 3 * 4),
        ({"eval_iters": 0}, 44, None),
        ({"valid_instruction_data": None}, 44, None),
    ],
)
def test_a_run_has_slots_for_all_that_it_reads(
    samples: Prepared, changes: dict[str, Any], train_slots: int, valid_slots: int | None
):
    """A step more than it takes, for Megatron's sampler; evaluations at every interval, at the end, and one more."""
    train, valid, test = finetune.instruction_datasets(arguments(samples, **changes))
    assert len(train) == train_slots and test is None  # type: ignore[arg-type]
    assert (valid is None) == (valid_slots is None)
    assert train.schedule.shuffle and train.schedule.per_step == 4  # type: ignore[attr-defined]
    if valid is not None:
        assert len(valid) == valid_slots and not valid.schedule.shuffle  # type: ignore[arg-type, attr-defined]


def test_packing_is_a_choice(samples: Prepared):
    packed, _, _ = finetune.instruction_datasets(arguments(samples))
    alone, _, _ = finetune.instruction_datasets(arguments(samples, no_instruction_packing=True))
    assert alone.packs == [[i] for i in range(12)] and len(packed.packs) < 12  # type: ignore[attr-defined]


def test_what_finetuning_asks_of_the_arguments(samples: Prepared, tmp_path: Path):
    args = arguments(samples)
    args.dataloader_inter_document_masking = False
    finetune.resolve(args)
    assert args.dataloader_inter_document_masking is True
    learned = sum(int(samples.sample(i).learned[1:].sum()) for i in range(12))
    assert args.loss_share == pytest.approx(learned / int(samples.lengths.sum()))
    longest = int(samples.lengths.max())
    answer = {"instruction": "Peru", "output": "Lima " * 80}
    lines = write_lines(tmp_path / "long.jsonl", [answer])
    long = prepared(str(samples.folder.parents[1] / "tok"), lines, tmp_path / "cache", 512)
    of_validation = {"valid_instruction_data": str(long.folder)}
    for changes, tokens in (({}, longest), (of_validation, int(long.lengths.max()))):
        finetune.resolve(arguments(samples, seq_length=tokens, **changes))
        told = rf"has a sample of {tokens} tokens, and a sequence has {tokens - 1}\n"
        with pytest.raises(ValueError, match=told):
            finetune.resolve(arguments(samples, seq_length=tokens - 1, **changes))
    plain = Namespace(instruction_data=None, dataloader_inter_document_masking=False)
    finetune.resolve(plain)
    assert plain.loss_share == 1.0 and not plain.dataloader_inter_document_masking


def test_padding_begins_behind_the_tokens():
    mask = finetune.padding_mask(torch.tensor([3, 1, 4]), 4)
    assert mask.tolist() == [[False] * 3 + [True], [False] + [True] * 3, [False] * 4]


@pytest.mark.parametrize("pre_process", [True, False])
@pytest.mark.parametrize("sequence_parallel", [True, False])
@pytest.mark.parametrize("experts", [None, 8])
def test_padding_as_a_stage_takes_it(
    monkeypatch: pytest.MonkeyPatch, pre_process: bool, sequence_parallel: bool, experts: int | None
):
    """Megatron cuts it in the first stage itself, and only for sequence parallelism; no router, no mask."""
    config = SimpleNamespace(num_moe_experts=experts, sequence_parallel=sequence_parallel)
    monkeypatch.setattr(finetune, "get_model_config", lambda model: config)
    monkeypatch.setattr(finetune, "get_attr_wrapped_model", lambda model, name: pre_process)
    monkeypatch.setattr(finetune.mpu, "get_tensor_model_parallel_world_size", lambda: 2)
    monkeypatch.setattr(finetune.mpu, "get_tensor_model_parallel_rank", lambda: 1)
    mask = torch.arange(8).view(2, 4) % 3 == 0
    found = finetune.local_padding(mask, torch.nn.Module())
    assert finetune.local_padding(None, torch.nn.Module()) is None
    if experts is None:
        assert found is None
    else:
        cut = sequence_parallel and not pre_process
        assert found is not None and torch.equal(found, mask[:, 2:] if cut else mask)


@pytest.mark.parametrize("grad_scale", [None, 8.0])
def test_auxiliary_losses_weigh_by_the_share_that_is_learned(
    monkeypatch: pytest.MonkeyPatch, grad_scale: float | None
):
    """Times the scale of the loss, in half precision; where all tokens are learned Megatron's own way is kept."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    scale_loss = None if grad_scale is None else lambda x: x * grad_scale
    config: Any = SimpleNamespace(moe_grad_scale_func=None, grad_scale_func=scale_loss)
    finetune.weigh_balance_losses(config, 1.0)
    assert config.moe_grad_scale_func is None
    finetune.weigh_balance_losses(config, 0.25)
    assert config.moe_grad_scale_func().tolist() == [0.25 * (grad_scale or 1)]
    known = config.moe_grad_scale_func
    finetune.weigh_balance_losses(config, 0.5)
    assert config.moe_grad_scale_func is known, "what is set already stays"
