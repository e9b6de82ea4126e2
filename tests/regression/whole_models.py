"""Whole tiny models, built from a command line as training builds them, inside a worker of the pool.

Letters: T tokens, B batch, S sequence, V rows of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.inference.models import argv

VOCAB = 127


def build(
    kinds: list[str],
    *flags: str,
    moe: bool = False,
    train: bool = False,
    dtype: torch.dtype = torch.float64,
    vp_stages: int = 1,
    noise: float = 0.2,
) -> Any:
    """The model of this rank (its virtual stages, where there are several), with weights far from their initial ones.

    Weights are the same on all ranks and in all layouts that do not divide them.
    """
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from linear_moe.model.builder import LinearMoEBuilder
    from linear_moe.training import arguments
    from linear_moe.training.pretrain import prepare_arguments

    args = prepare_arguments(argv(kinds, *flags, moe=moe))
    config = arguments.model_config(args)
    parallel_state.initialize_model_parallel(
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=args.virtual_pipeline_model_parallel_size,
        context_parallel_size=args.context_parallel_size,
    )
    model_parallel_cuda_manual_seed(1234, force_reset_rng=True)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    stages = [
        LinearMoEBuilder(config).build_model(groups, vp_stage=stage if vp_stages > 1 else None)
        for stage in range(vp_stages)
    ]
    torch.manual_seed(1)
    for model in stages:
        for parameter in model.parameters():
            parameter.data += noise * torch.randn_like(parameter)
        model.to(dtype).train(train)
    return stages if vp_stages > 1 else stages[0]


def of_models(
    rank: int, world: int, names: list[str], measures: list[Callable[[Any], Any]], *flags: str
) -> dict[str, dict[str, Any]]:
    """What each measure says of a one-layer model of every mixer, by mixer and name; the model is built once."""
    from tests.workers import leave_model_parallel

    found = {}
    for name in names:
        try:
            model = build([name], *flags)
            found[name] = {measure.__name__: measure(model) for measure in measures}
        except Exception as error:
            error.add_note(f"in a model of {name}")
            raise
        leave_model_parallel()
    return found


def random_tokens(batch: int, length: int, seed: int = 7) -> Tensor:
    """``[B, S]``, the same every time."""
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def logits(model: Any, tokens_BT: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """``[B, T, V]``, all tokens at once as in training; with gradients."""
    from linear_moe.training.data import documents

    positions_BT = torch.arange(tokens_BT.shape[1]).expand_as(tokens_BT)
    packed = documents(cu_seqlens, tokens_BT.shape[1])
    return model(tokens_BT, positions_BT, None, packed_seq_params=packed)


def cp_logits(model: Any, tokens_BS: Tensor, group: Any) -> Tensor:
    """``[B, S, V]`` from ranks that hold two chunks of every sequence each, put together on every rank."""
    from linear_moe.parallel.layout import SequenceLayout

    size = group.size()
    layouts = [SequenceLayout(*tokens_BS.shape, size, rank) for rank in range(size)]
    positions_BS = torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS)
    mine = layouts[group.rank()]
    local_BTV = model(mine.take(tokens_BS, dim=1), mine.take(positions_BS, dim=1), None).detach()
    pieces = [torch.empty_like(local_BTV) for _ in layouts]
    torch.distributed.all_gather(pieces, local_BTV.contiguous(), group=group)
    places = torch.cat([layout.take(positions_BS[0], dim=0) for layout in layouts])
    return torch.cat(pieces, dim=1)[:, places.argsort()]


def stepwise(model: Any, tokens_BT: Tensor) -> Tensor:
    """``[B, T, V]``, one token at a time with the memory carried along: the order of time by construction."""
    from linear_moe.inference.decoder import Decoder

    was_training = model.training
    decoder = Decoder(model.eval(), *tokens_BT.shape)
    steps = [decoder.feed(token_B1) for token_B1 in tokens_BT.split(1, dim=1)]
    model.train(was_training)
    return torch.stack(steps, dim=1)


def backward_of_nothing(model: Any, tokens_BT: Tensor) -> None:
    """Gradients of 0 times the logits: what is left comes from losses that layers add by themselves."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1))  # as a training does, for which it stays set
    (logits(model, tokens_BT).sum() * 0.0).backward()


def changed(tokens_BT: Tensor, *where: Any) -> Tensor:
    """A copy with other tokens at ``where``."""
    copy = tokens_BT.clone()
    copy[where] = (copy[where] + 1) % VOCAB
    return copy


def difference(found: Tensor, truth: Tensor) -> float:
    """Largest difference over the largest true value."""
    assert found.shape == truth.shape, (found.shape, truth.shape)
    scale = truth.abs().max().clamp(min=1e-30)
    return ((found - truth).abs().max() / scale).nan_to_num(float("inf")).item()
