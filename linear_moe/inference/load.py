"""A trained model from its run folder alone, whatever layout it was trained and saved under.

``RUN/config.json`` says which model (:mod:`linear_moe.inference.rebuild`), ``RUN/checkpoint`` holds its weights
(:mod:`linear_moe.inference.checkpoint`). One process holds the whole model; several (``torchrun``) divide it by tensor
parallelism. Nothing is written into the run. Importing this module switches a machine without a CUDA device to the CPU
platform.
"""

from __future__ import annotations

import shlex

from linear_moe.training import cpu

if cpu.needed():
    cpu.activate()  # before Megatron looks for a device

import os
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, model_parallel_cuda_manual_seed
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

from linear_moe.inference.checkpoint import checkpoint_folder, find_run, is_hugging_face, load_weights
from linear_moe.inference.rebuild import single_process_arguments
from linear_moe.inference.tokenizer import check_given, tokenizer_folder
from linear_moe.model.builder import LinearMoEBuilder, LinearMoEModelConfig
from linear_moe.training import arguments
from linear_moe.training.run import read_config


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to read and write tokens."""

    model: GPTModel
    """In evaluation mode, on the CUDA device if there is one."""
    tokenizer: Any
    """Megatron's tokenizer: ``tokenize``, ``detokenize``, ``eod``."""
    config: LinearMoEModelConfig
    """What the model was built from."""
    iteration: int
    """Step of the checkpoint."""
    vocab_size: int
    """Tokens that mean something; rows of the embedding beyond are padding."""
    max_sequence_length: int | None
    """Longest sequence, or None: any."""
    warning: str | None = None
    """What its text may suffer from."""


def load_model(
    run: Path | str,
    *,
    step: int | None = None,
    dtype: torch.dtype | None = None,
    max_sequence_length: int | None = None,
    tokenizer: Path | str | None = None,
) -> LoadedModel:
    """Rebuild the model of a run and load its weights.

    Joins the process group if there is one, and makes one otherwise; its processes share the model by tensor
    parallelism.

    Args:
        run: folder with ``config.json`` and ``checkpoint/``; its checkpoint folder; one iteration in that; or a folder
            of Hugging Face's, which is imported into a temporary one (``TMPDIR`` needs room for it).
        step: which checkpoint; the last complete one unless given.
        dtype: of the weights; the run's unless given. What training keeps in float32 stays float32.
        max_sequence_length: refuse longer sequences; unless given, only learned positions set a limit.
        tokenizer: folder of the tokenizer, in case it has moved since the training, or the training knew numbers alone
            (TOKENIZER=null). With more tokens: a warning.

    Raises:
        ValueError: not a run, no such checkpoint, a damaged one, no tokenizer or another one than the run's, or more
            processes than can share it.
    """
    if not is_hugging_face(Path(run)):
        return _load_run(Path(run), step, dtype, max_sequence_length, tokenizer)
    if step is not None or world_size() > 1:
        raise ValueError(
            f"{run} is a model in Hugging Face's format\n"
            f"  why: it has no steps, and only one process reads it directly\n"
            f"  try: python tools/convert.py import --hf {shlex.quote(str(run))} --save <folder>, and that folder"
        )
    from linear_moe.checkpoint.importing import import_model  # it builds on this module

    with tempfile.TemporaryDirectory(prefix="linear_moe_import_") as folder:
        import_model(run, Path(folder) / "run")
        return _load_run(Path(folder) / "run", None, dtype, max_sequence_length, tokenizer)


def _load_run(
    run: Path,
    step: int | None,
    dtype: torch.dtype | None,
    max_sequence_length: int | None,
    tokenizer: Path | str | None,
) -> LoadedModel:
    run, step = find_run(run, step)
    saved = read_config(run)
    folder, iteration = checkpoint_folder(run, step)
    warning = check_given(tokenizer, run, saved) if tokenizer else None
    if warning is not None:
        warnings.warn(warning, stacklevel=3)
    ranks = world_size()
    args = single_process_arguments(
        saved["arguments"],
        padded_vocab_size=saved["architecture"]["padded_vocab_size"],
        dtype=dtype,
        tensor_parallel=ranks,
    )
    args.tokenizer_model = str(tokenizer) if tokenizer else tokenizer_folder(run, saved)
    if tokenizer and args.tokenizer_type == "NullTokenizer":
        args.tokenizer_type = "HuggingFaceTokenizer"  # the numbers that it learned are this one's tokens
    config = arguments.model_config(args)
    limit = _sequence_limit(config, max_sequence_length)
    text = _build_tokenizer(run, args)
    join_tensor_parallel(args.seed)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = LinearMoEBuilder(config).build_model(groups, pre_process=True, post_process=True)
    model = for_inference(model, args.params_dtype)
    load_weights(model, folder, groups.dp_cp)
    return LoadedModel(
        model=model,
        tokenizer=text,
        config=config,
        iteration=iteration,
        vocab_size=min(text.vocab_size, args.padded_vocab_size),
        max_sequence_length=limit,
        warning=warning,
    )


def for_inference(model: GPTModel, dtype: torch.dtype) -> GPTModel:
    """All of it on the device (Megatron makes the gate of shared experts on the CPU), in `dtype`, without gradients."""
    return model.cuda().to(dtype).eval().requires_grad_(False)


def world_size() -> int:
    """Processes of this program: of the process group, or those that ``torchrun`` has started."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def join_single_process(seed: int = 1234) -> None:
    """Process groups and random numbers of Megatron for a model on one process, where they are not there yet.

    Raises:
        ValueError: there is more than one process.
    """
    if world_size() != 1:
        raise ValueError(
            f"a whole model is held by one process, and there are {world_size()}\n"
            f"  why: every layout can be read by one process\n"
            f"  try: python instead of torchrun, or torchrun --nproc-per-node 1"
        )
    join_tensor_parallel(seed)


def join_tensor_parallel(seed: int = 1234) -> None:
    """The same for a model that all processes share by tensor parallelism.

    Raises:
        ValueError: Megatron has another layout already.
    """
    if not dist.is_initialized():
        backend = "gloo" if cpu.is_active() else "nccl"
        if world_size() > 1:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            dist.init_process_group(backend)
        else:  # no port and no host name: the only process finds itself
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=world_size())
    if parallel_state.get_tensor_model_parallel_world_size() != world_size():
        raise ValueError(
            f"{world_size()} processes are there, and Megatron divides layers over "
            f"{parallel_state.get_tensor_model_parallel_world_size()} of them\n"
            f"  why: a model that is loaded to be used is shared by tensor parallelism alone\n"
            f"  try: load it before a layout is set, or in a program of its own"
        )
    if not get_cuda_rng_tracker().is_initialized():
        model_parallel_cuda_manual_seed(seed)


def _sequence_limit(config: LinearMoEModelConfig, wanted: int | None) -> int | None:
    rows = config.seq_length if config.position_embedding_type == "learned_absolute" else None
    if wanted is not None and rows is not None and wanted > rows:
        raise ValueError(
            f"max_sequence_length is {wanted}, the model has {rows} positions\n"
            f"  why: it learned an embedding for each position\n"
            f"  try: max_sequence_length={rows}"
        )
    return rows if wanted is None else wanted


def _build_tokenizer(run: Path, args: Any) -> Any:
    try:
        return build_tokenizer(args)
    except Exception as error:
        raise ValueError(
            f"the tokenizer of {run} cannot be opened: {args.tokenizer_type} {args.tokenizer_model}\n"
            f"  why: {str(error).splitlines()[0] if str(error) else type(error).__name__}\n"
            f"  try: --tokenizer <folder with tokenizer.json>, if it has moved since the training"
        ) from error
