"""A whole model with fused kernels in Triton's interpreter and with chunked torch: ``python fused_model.py KIND ...``.

Prints one JSON line: the largest differences of losses, and of gradients relative to their norms. By hand, all mixers:
``for k in 'gla hgrn2 rwkv6 gsa' 'gated_deltanet kda deltanet mamba2' 'based rebased retention linear_attention'; do
python tests/model/fused_model.py $k; done``.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"
    sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.distributed as dist
from torch import Tensor

from linear_moe.training import cpu

DOCUMENTS = (0, 3, 4, 20, 32)


def losses_and_gradients(model: torch.nn.Module, backend: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Of one row of packed documents, the output layer in chunks."""
    from linear_moe.model.output_loss import loss_in_chunks
    from linear_moe.training.data import documents
    from tests.regression.whole_models import random_tokens

    os.environ["LINEAR_MOE_KERNELS"] = backend
    tokens = random_tokens(1, DOCUMENTS[-1])
    mask = torch.ones(tokens.shape)
    model.zero_grad(set_to_none=True)
    losses = model(
        tokens,
        torch.arange(tokens.shape[1])[None],
        None,
        labels=tokens,
        loss_mask=mask,
        packed_seq_params=documents(torch.tensor([DOCUMENTS]), tokens.shape[1]),
        output_processor=loss_in_chunks(24),
    )
    (losses * mask).sum().backward()
    return losses.detach(), {n: w.grad for n, w in model.named_parameters() if w.grad is not None}


def main(kinds: list[str]) -> None:
    cpu.activate()
    from tests.kernels import quick_interpreter
    from tests.regression.whole_models import build
    from tests.workers import free_port

    store = dist.TCPStore("127.0.0.1", free_port(), 1, True)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    model = build(
        [*kinds, "softmax"],
        *("--moe-shared-expert-intermediate-size", "32"),
        moe=True,
        train=True,
        dtype=torch.float32,
        noise=0.05,
    )
    quick_interpreter.install()
    true_losses, true = losses_and_gradients(model, "chunked")
    losses, found = losses_and_gradients(model, "triton")
    assert found.keys() == true.keys()
    difference = {n: ((found[n] - g).norm() / g.norm().clamp(min=1e-8)).item() for n, g in true.items()}
    print(json.dumps([(losses - true_losses).abs().max().item(), max(difference.values())]))


if __name__ == "__main__":
    main(sys.argv[1:])
