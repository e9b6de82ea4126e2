"""A stock Megatron GPT, trained by Megatron's ``pretrain()`` inside a worker: what the CPU platform has to carry."""

import random
import sys
from functools import partial
from typing import Any

import numpy as np
import torch

SEQUENCE = 16
TINY = (
    "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --ffn-hidden-size 48 --seq-length 16"
    " --max-position-embeddings 16 --position-embedding-type rope --normalization RMSNorm --swiglu"
    " --disable-bias-linear --untie-embeddings-and-output-weights --attention-dropout 0.1 --hidden-dropout 0.1"
    " --mock-data --tokenizer-type NullTokenizer --vocab-size 60 --make-vocab-size-divisible-by 64"
    " --micro-batch-size 2 --global-batch-size 8 --lr 1e-2 --min-lr 1e-3 --lr-decay-iters 10 --lr-warmup-iters 2"
    " --clip-grad 1.0 --weight-decay 0.1 --log-interval 1 --eval-interval 1000 --eval-iters 0 --save-interval 1000"
    " --distributed-timeout-minutes 2 --no-one-logger"
)
MOE = (
    "--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 24 --moe-aux-loss-coeff 1e-2"
    " --moe-router-load-balancing-type aux_loss --moe-token-dispatcher-type alltoall"
)


def pretrain_tiny(rank: int, world_size: int, flags: str, iterations: int) -> dict[str, Any]:
    """Train to iteration `iterations` of 4; its losses, and what a resumed run has to have in common with this one."""
    import megatron.training.training as training
    from megatron.core.enums import ModelType
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    from linear_moe.training import engine

    losses: list[float] = []
    engine.install(training_log=partial(_recording, losses))
    sys.argv = ["pretrain", *f"{TINY} {flags} --train-iters 4 --exit-interval {iterations}".split()]
    args = parse_and_validate_args(extra_args_provider=_defaults)
    args.iteration = 0
    made: list[Any] = []
    stock_setup = training.setup_model_and_optimizer

    def setup(*setup_args: Any, **kwargs: Any) -> Any:
        made.extend(stock_setup(*setup_args, **kwargs))
        return tuple(made)

    training.setup_model_and_optimizer = setup
    _dataset_provider.is_distributed = True
    try:
        training.pretrain(
            pretrain_cfg_container_from_args(args, gpt_config_from_args(args)),
            _dataset_provider,
            ModelType.encoder_or_decoder,
            _forward_step,
        )
    except SystemExit as end:  # --exit-interval
        assert not end.code, end
    finally:
        training.setup_model_and_optimizer = stock_setup
    return {"losses": losses, **_state(made[0], made[1])}


def _defaults(parser: Any) -> Any:
    from linear_moe.training import engine

    parser.set_defaults(**engine.defaults_without_te())
    return parser


def _recording(losses: list[float], original: Any) -> Any:
    def training_log(loss_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        losses.extend(float(value) for name, value in loss_dict.items() if name == "lm loss")
        return original(loss_dict, *args, **kwargs)

    return training_log


def _state(model: list[Any], optimizer: Any) -> dict[str, Any]:
    """Parameters, Adam's states, and every RNG state of this rank."""
    from megatron.core.optimizer.optimizer import ChainedOptimizer
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    parameters = {
        f"{chunk}.{name}": value.detach().clone()
        for chunk, module in enumerate(model)
        for name, value in module.named_parameters()
    }
    chain = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    adam = [
        {name: tensor.clone() for name, tensor in single.optimizer.state[param].items()}
        for single in chain
        for group in single.optimizer.param_groups
        for param in group["params"]
    ]
    rng = {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        **get_cuda_rng_tracker().get_states(),
    }
    return {
        "parameters": parameters,
        "adam": adam,
        "rng": rng,
        "python": random.getstate(),
        "numpy": np.random.get_state()[1],
    }


def _dataset_provider(num_samples: Any, vp_stage: int | None = None) -> Any:
    from megatron.core import parallel_state
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset
    from megatron.training import get_args, get_tokenizer

    config = GPTDatasetConfig(
        random_seed=get_args().seed,
        sequence_length=SEQUENCE,
        split="1,0,0",
        tokenizer=get_tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    reads = parallel_state.get_tensor_model_parallel_rank() == 0
    return BlendedMegatronDatasetBuilder(MockGPTDataset, num_samples, lambda: reads, config).build()


def _forward_step(data_iterator: Any, model: Any) -> Any:
    """One micro-batch, read by the first tensor-parallel rank alone, as Megatron's own script does."""
    from megatron.core import parallel_state

    batch = {
        "tokens": torch.empty(2, SEQUENCE, dtype=torch.int64, device="cuda"),
        "labels": torch.empty(2, SEQUENCE, dtype=torch.int64, device="cuda"),
        "loss_mask": torch.empty(2, SEQUENCE, dtype=torch.float32, device="cuda"),
        "position_ids": torch.empty(2, SEQUENCE, dtype=torch.int64, device="cuda"),
    }
    if data_iterator is not None:
        batch = {name: next_batch.cuda() for name, next_batch in next(data_iterator).items() if name in batch}
    group = parallel_state.get_tensor_model_parallel_group()
    for tensor in (batch[name] for name in sorted(batch)):
        torch.distributed.broadcast(tensor, group=group, group_src=0)
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return output, partial(_loss, batch["loss_mask"])


def _loss(loss_mask: torch.Tensor, output: torch.Tensor) -> Any:
    mask = loss_mask.reshape(-1).float()
    total = torch.sum(output.reshape(-1).float() * mask)
    num = mask.sum().to(torch.int)
    return total, num, {"lm loss": torch.cat([total.detach().view(1), num.view(1)])}
