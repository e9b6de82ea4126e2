"""A tiny model trained through ``linear_moe.training.pretrain`` inside the pool of gloo workers."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

ARGUMENTS = [
    *("--num-layers", "4", "--hidden-size", "64", "--ffn-hidden-size", "96", "--kv-channels", "16"),
    *("--num-attention-heads", "4", "--num-query-groups", "4", "--group-query-attention", "--add-qkv-bias"),
    *("--normalization", "RMSNorm", "--norm-epsilon", "1e-6", "--swiglu", "--disable-bias-linear"),
    *("--position-embedding-type", "rope", "--rotary-base", "10000", "--untie-embeddings-and-output-weights"),
    *("--seq-length", "64", "--max-position-embeddings", "64", "--micro-batch-size", "1"),
    *("--global-batch-size", "4", "--train-iters", "6", "--lr", "1e-4", "--min-lr", "1e-5"),
    *("--lr-decay-style", "cosine", "--lr-warmup-iters", "1", "--init-method-std", "0.02"),
    *("--attention-dropout", "0", "--hidden-dropout", "0", "--seed", "1234", "--num-workers", "0"),
    *("--mock-data", "--split", "99,1,0", "--eval-iters", "0", "--eval-interval", "1000"),
    *("--tokenizer-type", "NullTokenizer", "--vocab-size", "127", "--padded-vocab-size", "128"),
    *("--no-create-attention-mask-in-dataloader", "--log-interval", "1", "--save-interval", "1000"),
    # four heads also in mixers that choose their own
    *("--hgrn2-expand-ratio", "16", "--mom-hgrn2-expand-ratio", "16"),
    *("--mamba2-ssm-head-dim", "32", "--mamba2-state-size", "16"),
]

EXPERTS = [
    *("--num-experts", "4", "--moe-router-topk", "2", "--moe-ffn-hidden-size", "32"),
    *("--moe-router-load-balancing-type", "aux_loss", "--moe-aux-loss-coeff", "1e-2"),
    *("--moe-token-dispatcher-type", "alltoall", "--moe-router-dtype", "fp32", "--moe-router-pre-softmax"),
    *("--expert-tensor-parallel-size", "1"),
]

DISTRIBUTED_OPTIMIZER = ["--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable"]


def train(
    rank: int, world: int, argv: list[str], observe: bool = False, exact: bool = False
) -> dict[str, Any]:
    """Run ``main(argv)``; with ``observe`` return this rank's pieces of the weights after step 1.

    With ``exact`` the model is float64: Megatron has no flag for it, though little in it minds.
    """
    from linear_moe.model.builder import LinearMoEBuilder
    from linear_moe.training import pretrain
    from linear_moe.training.metrics import RunLog

    seen: dict[str, Any] = {}
    chunks: list[torch.nn.Module] = []
    build, measure, prepare = LinearMoEBuilder.build_model, RunLog._measure, pretrain.prepare_arguments

    def built(self: Any, *args: Any, **kwargs: Any) -> Any:
        chunks.append(build(self, *args, **kwargs))
        return chunks[-1]

    def measured(self: Any, iteration: int, *args: Any, **kwargs: Any) -> Any:
        if observe and iteration == 1:
            seen["after"] = [piece for i, chunk in enumerate(chunks) for piece in pieces(chunk, i)]
        return measure(self, iteration, *args, **kwargs)

    def prepared(argv: list[str]) -> Any:
        args = prepare(argv)
        if exact:
            args.params_dtype = torch.float64
        return args

    LinearMoEBuilder.build_model, RunLog._measure, pretrain.prepare_arguments = built, measured, prepared
    try:
        with stale_sums_are_nan():
            pretrain.main(argv)
    except SystemExit as stop:  # --exit-interval
        assert not stop.code, f"exit code {stop.code}"
    finally:
        LinearMoEBuilder.build_model, RunLog._measure, pretrain.prepare_arguments = build, measure, prepare
    seen["rng"] = rng_states()
    return seen


@contextmanager
def stale_sums_are_nan() -> Iterator[list[torch.nn.Parameter]]:
    """Gradients that a step leaves in their sums, to be overwritten, are NaN: nobody reads them. Whose they are."""
    from linear_moe.training import engine, optimizer_step

    left: list[torch.nn.Parameter] = []
    mark_stale = optimizer_step.mark_stale

    def mark_and_spoil(original: Callable) -> Callable:
        reset = mark_stale(original)

        def spoil(self: Any) -> None:
            reset(self)
            for param in self.params:
                if getattr(param, optimizer_step.STALE, False):
                    param.main_grad.fill_(float("nan"))
                    left.append(param)

        return spoil

    try:
        with mock.patch.object(optimizer_step, "mark_stale", mark_and_spoil):
            engine.install()
            yield left
    finally:
        engine.install()


def rng_states() -> list[Any]:
    """Every random state that training draws from."""
    import random

    import numpy as np
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    tracked = {name: state.tolist() for name, state in get_cuda_rng_tracker().get_states().items()}
    numpy_state = [str(part) for part in np.random.get_state()]
    return [random.getstate(), numpy_state, torch.get_rng_state().tolist(), tracked]


def checkpoint(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Everything in a checkpoint, unsharded: weights and optimizer state, and the common state. In a worker."""
    from megatron.core.dist_checkpointing import load_common_state_dict, load_plain_tensors

    loaded = load_plain_tensors(str(folder)).items()
    return {key: x.cpu() for key, x in loaded if torch.is_tensor(x)}, load_common_state_dict(str(folder))


def pieces(model: Any, chunk: int) -> list[tuple[str, tuple[int, ...], tuple[int, ...], torch.Tensor]]:
    """``(key, global shape, offset, data)`` of every parameter shard of this rank, by checkpoint key."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    state = model.sharded_state_dict()
    apply_factories(state)
    found = []
    for tensor in nested_values(state):
        if isinstance(tensor, ShardedTensor) and tensor.data is not None:
            data = tensor.data.detach().to("cpu", copy=True)
            data = data.reshape((1,) * tensor.prepend_axis_num + tuple(data.shape))
            found.append((tensor.key, tuple(tensor.global_shape), tuple(tensor.global_offset), data))
    return found


def whole(
    ranks: list[list[tuple[str, tuple[int, ...], tuple[int, ...], torch.Tensor]]],
) -> dict[str, torch.Tensor]:
    """Every parameter of the model, unsharded, from the pieces of all ranks; replicas must agree."""
    tensors: dict[str, torch.Tensor] = {}
    for key, shape, offset, data in (piece for rank in ranks for piece in rank):
        tensor = tensors.setdefault(key, torch.full(shape, float("nan"), dtype=data.dtype))
        view = tensor[tuple(slice(o, o + n) for o, n in zip(offset, data.shape, strict=True))]
        written = ~view.isnan()
        assert torch.equal(view[written], data[written]) or torch.allclose(
            view[written], data[written], rtol=1e-6, atol=1e-9
        ), f"replicas of {key} differ between ranks"
        view.copy_(data)
    for key, tensor in tensors.items():
        assert not tensor.isnan().any(), f"no rank holds all of {key}"
    return tensors


def records(run: Path) -> list[dict[str, Any]]:
    """``metrics.jsonl``: the steps and evaluations of a run."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def metrics(run: Path) -> list[dict[str, Any]]:
    """The steps of a run."""
    return [record for record in records(run) if "seconds" in record]


def losses(run: Path) -> list[float]:
    """The loss of every step."""
    return [step["lm_loss"] for step in metrics(run)]
