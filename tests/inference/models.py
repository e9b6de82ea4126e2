"""Tiny models for the tests of inference, built and read inside a worker of the pool."""

from pathlib import Path
from typing import Any

import torch

from tests.training.tiny import ARGUMENTS, EXPERTS

VOCAB = 127


def argv(kinds: list[str], *extra: str, moe: bool = True) -> list[str]:
    """Command line of a training; later flags win."""
    model = ["--num-layers", str(len(kinds)), "--layer-kinds", ",".join(kinds)]
    return [*ARGUMENTS, *(EXPERTS if moe else []), *model, *extra]


def random_model(kinds: list[str], *extra: str, moe: bool = True, dtype: torch.dtype = torch.float64) -> Any:
    """A model as ``load_model`` builds it, with random weights far from their initial values."""
    return random_weights(argv(kinds, *extra, moe=moe), dtype)


def random_family(
    family: str, size: str, kinds: list[str], *extra: str, dtype: torch.dtype = torch.float64
) -> Any:
    """The same of a family's shrunken size."""
    from linear_moe.model.families import FAMILIES
    from tests.model.family_models import command_line, shrunken

    shape = shrunken(FAMILIES[family].sizes[size])
    kinds = kinds[: shape.num_layers]
    return random_weights(command_line(FAMILIES[family], shape, kinds, *extra), dtype)


def random_weights(words: list[str], dtype: torch.dtype) -> Any:
    """A model of a training's command line."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    from linear_moe.inference.load import LoadedModel, for_inference, join_single_process
    from linear_moe.inference.rebuild import single_process_arguments
    from linear_moe.model.builder import LinearMoEBuilder
    from linear_moe.training import arguments

    args = single_process_arguments(words, padded_vocab_size=128, dtype=dtype)
    args.perform_initialization = True
    config = arguments.model_config(args)
    join_single_process()
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = LinearMoEBuilder(config).build_model(groups, pre_process=True, post_process=True)
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return LoadedModel(for_inference(model, dtype), None, config, 0, VOCAB, None)


def whole_forward(model: Any, tokens: list[list[int]]) -> torch.Tensor:
    """Logits ``[B, T, V]`` of one forward pass without any memory, as in training."""
    tokens_BT = torch.tensor(tokens, device=next(model.parameters()).device)
    positions_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device).expand_as(tokens_BT)
    with torch.no_grad():
        return model(tokens_BT, positions_BT, None)


def prompts(batch: int, length: int) -> list[list[int]]:
    """Random prompts, the same every time."""
    generator = torch.Generator().manual_seed(7)
    return torch.randint(0, VOCAB, (batch, length), generator=generator).tolist()


def files(run: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file of a run."""
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(run.rglob("*"))}
