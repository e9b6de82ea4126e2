"""Output projection and cross entropy in chunks of tokens, so that the logits of a micro-batch never exist at once.

    loss_t = cross_entropy(W h_t, label_t)

Logits become their own gradient in place (:func:`linear_moe.kernels.cross_entropy_`), and the gradients of
h and W are ready when the forward pass ends: nothing is computed again. That needs the factor of each token's loss,
which is the loss mask times one number that only the backward pass knows, and multiplies by. A gradient that is
not of this form turns into NaN.

With tensor parallelism each rank has a slice of the vocabulary; three numbers per token travel. With sequence
parallelism the hidden states are gathered, and their gradient is reduce-scattered.

Letters: T tokens here, B rows, D hidden size, V vocabulary of this rank, M tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from linear_moe.kernels import cross_entropy_
from linear_moe.model.mixer_projections import wait_for


def loss_in_chunks(num_tokens: int) -> Callable[..., Tensor]:
    """An ``output_processor`` of Megatron's ``GPTModel``: losses ``[B, T]`` from chunks of ``num_tokens`` tokens."""

    def process(
        *,
        hidden_states: Tensor,
        output_layer: Any,
        output_weight: Tensor | None,
        labels: Tensor,
        loss_mask: Tensor,
        **others: Any,
    ) -> Tensor:
        weight = output_layer.weight if output_weight is None else output_weight
        wait_for(output_layer)
        losses_TB = _OutputLoss.apply(
            hidden_states,
            weight,
            labels.transpose(0, 1),
            loss_mask.transpose(0, 1),
            output_layer.tp_group,
            output_layer.sequence_parallel,
            num_tokens,
        )
        return losses_TB.transpose(0, 1).contiguous()

    return process


class _OutputLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TBD: Tensor,
        weight_VD: Tensor,
        label_TB: Tensor,
        mask_TB: Tensor,
        group: dist.ProcessGroup,
        is_sequence_parallel: bool,
        chunk: int,
    ) -> Tensor:
        hidden_TBD = hidden_TBD.detach()
        if is_sequence_parallel and group.size() > 1:
            own, hidden_TBD = hidden_TBD, hidden_TBD.new_empty(label_TB.shape[0], *hidden_TBD.shape[1:])
            dist.all_gather_into_tensor(hidden_TBD, own.contiguous(), group=group)
        hidden_ND, label_N = (
            hidden_TBD.flatten(0, 1),
            label_TB.reshape(-1) - group.rank() * weight_VD.shape[0],
        )
        mask_N = mask_TB.reshape(-1).to(torch.promote_types(hidden_ND.dtype, torch.float32))
        needs_gradient = any(ctx.needs_input_grad[:2])
        d_hidden_ND = torch.empty_like(hidden_ND) if needs_gradient else None
        d_weight_VD = torch.empty_like(weight_VD, dtype=mask_N.dtype) if needs_gradient else None
        every_chunk_MV = hidden_ND.new_empty(min(chunk, len(label_N)), weight_VD.shape[0])
        losses = []
        for x_MD, label_M, mask_M, rows in zip(
            hidden_ND.split(chunk), label_N.split(chunk), mask_N.split(chunk), _rows(len(label_N), chunk), strict=True
        ):  # fmt: skip
            logits_MV = torch.mm(x_MD, weight_VD.t(), out=every_chunk_MV[: len(x_MD)])
            losses.append(cross_entropy_(logits_MV, label_M, mask_M, combine=_over(group)))
            if d_hidden_ND is not None and d_weight_VD is not None:
                torch.mm(logits_MV, weight_VD, out=d_hidden_ND[rows])
                _add_product(d_weight_VD, logits_MV.t(), x_MD, is_first=rows.start == 0)
        if d_hidden_ND is not None:
            d_hidden_TBD = _sum_over(group, d_hidden_ND.view_as(hidden_TBD), is_sequence_parallel)
            ctx.save_for_backward(d_hidden_TBD, d_weight_VD, mask_N)
        ctx.dtype = weight_VD.dtype
        return torch.cat(losses).view(label_TB.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss_TB: Tensor) -> tuple[Any, ...]:
        d_hidden_TBD, d_weight_VD, mask_N = ctx.saved_tensors
        d_loss_N = d_loss_TB.reshape(-1).to(mask_N.dtype)
        factor = (d_loss_N * mask_N).sum() / mask_N.square().sum().clamp(min=1e-30)
        is_of_this_form = (d_loss_N - factor * mask_N).abs().amax() <= 1e-4 * d_loss_N.abs().amax()
        factor = torch.where(is_of_this_form, factor, float("nan"))
        d_weight = None
        if ctx.needs_input_grad[1]:
            # Rounded as it is written: in float32 first, it would be twice the weight's size, written and read again.
            d_weight = torch.empty_like(d_weight_VD, dtype=ctx.dtype)
            torch.mul(d_weight_VD, factor, out=d_weight)
        return (d_hidden_TBD * factor).to(d_hidden_TBD.dtype), d_weight, None, None, None, None, None


def _rows(num_tokens: int, chunk: int) -> list[slice]:
    return [slice(first, first + chunk) for first in range(0, num_tokens, chunk)]


def _over(
    group: dist.ProcessGroup,
) -> Callable[[tuple[Tensor, Tensor, Tensor]], tuple[Tensor, Tensor, Tensor]] | None:
    return None if group.size() == 1 else partial(_combine, group)


def _combine(group: dist.ProcessGroup, found: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics of this rank's slice of the vocabulary to those of all of it."""
    largest, total, picked = found
    whole = largest.clone()
    dist.all_reduce(whole, dist.ReduceOp.MAX, group=group)
    sums = torch.stack([total * (largest - whole).exp(), picked])
    dist.all_reduce(sums, group=group)
    return whole, sums[0], sums[1]


def _add_product(total: Tensor, a: Tensor, b: Tensor, is_first: bool) -> None:
    """``total += a @ b``, summed in total's dtype; the first product needs no zeros to be added to."""
    beta = 0 if is_first else 1  # 0: torch does not look at what is there, NaN or not
    if a.dtype == total.dtype:
        total.addmm_(a, b, beta=beta)
    elif a.is_cuda:
        # The GEMM adds to what is there; a product of its own would be written, read and added.
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype), beta=beta)


def _sum_over(group: dist.ProcessGroup, x: Tensor, is_sequence_parallel: bool) -> Tensor:
    """Every rank's part of the gradient, summed: whole on every rank, or each its own tokens."""
    if group.size() == 1:
        return x
    if not is_sequence_parallel:
        dist.all_reduce(x, group=group)
        return x
    own = x.new_empty(x.shape[0] // group.size(), *x.shape[1:])
    dist.reduce_scatter_tensor(own, x, group=group)
    return own
