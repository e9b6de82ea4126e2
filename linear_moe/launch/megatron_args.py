"""A plan as the command line of Megatron's `pretrain()`, and of torchrun around it.

What is not a variable is fixed here, as in the earlier system's scripts: Adam (0.9, 0.95), weight decay 0.1, gradient
norm 1.0, cosine, initial std 0.008, no dropout, 1 % of the data held out. One list, no shell, no quoting.
"""

import shlex
import sys
from pathlib import Path

from linear_moe.data.indexed import read_index
from linear_moe.launch.instructions import instruction_arguments, kept_tokenizer
from linear_moe.launch.plan import MOCK_DATA, RunPlan
from linear_moe.launch.resume import is_finished, pretrained_folder
from linear_moe.model.families import megatron_arguments

DEFAULT_PORT = 29500
"""Where several nodes meet when MASTER_PORT is not set."""

_FIXED = [
    *("--optimizer", "adam", "--adam-beta1", "0.9", "--adam-beta2", "0.95"),
    *("--weight-decay", "0.1", "--clip-grad", "1.0"),
    *("--lr-decay-style", "cosine", "--init-method-std", "0.008"),
    *("--attention-dropout", "0.0", "--hidden-dropout", "0.0"),
    # A resumed run follows the schedule its variables describe, so that TRAIN_ITERS can be raised.
    "--override-opt_param-scheduler",
]


def training_arguments(plan: RunPlan) -> list[str]:
    """Arguments of `linear_moe.training.pretrain`: Megatron's flags, and ours (`--layer-kinds`, `--run-dir`, ...)."""
    return [
        *_model(plan),
        *_layout(plan),
        *_batch_and_optimizer(plan),
        *_data(plan),
        *_memory_and_kernels(plan),
        *_run_folder(plan),
        *plan.extra_args,
    ]


def _model(plan: RunPlan) -> list[str]:
    s = plan.settings
    flags = ["--family", plan.family.name, "--model-size", plan.size_name]
    flags += ["--layer-kinds", ",".join(plan.kinds), "--la-module", s.la_module]
    if s.mixer_modules:
        flags += ["--mixer-module", s.mixer_modules]
    if s.layer_type_list:
        flags += ["--layer-type-list", s.layer_type_list]
    return flags + megatron_arguments(plan.family, plan.size, moe_aux_loss_coeff=s.moe_aux_loss_coeff)


def _layout(plan: RunPlan) -> list[str]:
    s = plan.settings
    flags = ["--tensor-model-parallel-size", str(s.tp), "--pipeline-model-parallel-size", str(s.pp)]
    flags += ["--context-parallel-size", str(s.cp)]
    flags += ["--distributed-backend", "gloo" if plan.on_cpu else "nccl"]
    if s.vpp > 1:
        flags += ["--num-virtual-stages-per-pipeline-rank", str(s.vpp)]
    if plan.size.is_moe:
        flags += ["--expert-model-parallel-size", str(s.ep), "--expert-tensor-parallel-size", str(plan.etp)]
    if plan.sequence_parallel:
        flags.append("--sequence-parallel")
    if s.do:
        # The form of the optimizer's checkpoint that any other layout can load.
        flags += ["--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable"]
    return flags


def _batch_and_optimizer(plan: RunPlan) -> list[str]:
    s = plan.settings
    return [
        *("--seq-length", str(s.seq_len), "--micro-batch-size", str(s.batch_size)),
        *("--global-batch-size", str(plan.global_batch_size), "--train-iters", str(s.iterations)),
        *("--lr", repr(s.lr), "--min-lr", repr(s.min_lr), "--lr-decay-iters", str(s.iterations)),
        *("--lr-warmup-iters", str(s.warmup_iterations), "--seed", str(s.seed)),
        *_FIXED,
    ]


def _data(plan: RunPlan) -> list[str]:
    s = plan.settings
    tokenizer = plan.tokenizer.path if plan.tokenizer is not None else None
    if plan.instructions is not None:
        flags, tokenizer = instruction_arguments(plan.instructions), str(kept_tokenizer(plan.run_dir))
    elif s.dataset_path == MOCK_DATA:
        flags = ["--mock-data"]
    else:
        blend = s.dataset_path.split() if plan.blend_weights else _weighted(plan.prefixes)
        flags = ["--data-path", *blend, "--data-cache-path", str(plan.run_dir.parent / "data_cache")]
    flags += ["--split", _split(plan), "--padded-vocab-size", str(plan.padded_vocab_size)]
    if tokenizer is not None:
        flags += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer]
    else:
        flags += ["--tokenizer-type", "NullTokenizer", "--vocab-size", str(plan.vocab_size)]
    # Every mixer knows its own causality; a [T, T] mask from the loader would only cost memory.
    flags.append("--no-create-attention-mask-in-dataloader")
    if s.pack or plan.instructions is not None:
        flags.append("--dataloader-inter-document-masking")
    if plan.on_cpu:
        flags += ["--num-workers", "0"]  # loader processes would take the cores that train
    return flags


def _weighted(prefixes: list[str]) -> list[str]:
    # Several without weights are one epoch for Megatron, behind which the run would end with a StopIteration.
    if len(prefixes) == 1 or not all(Path(prefix + ".idx").exists() for prefix in prefixes):
        return prefixes
    return [word for prefix in prefixes for word in (str(read_index(prefix).num_tokens), prefix)]


def _split(plan: RunPlan) -> str:
    # Megatron counts the epochs of a part without documents for ever, even if nothing is asked of it.
    documents = [
        read_index(prefix).num_documents for prefix in plan.prefixes if Path(prefix + ".idx").exists()
    ]
    return "99,1,0" if all(map(held_out_documents, documents)) else "100,0,0"


def held_out_documents(documents: int) -> int:
    """How many of a data set's documents are for evaluation, rounded as Megatron rounds them."""
    return documents - round(0.99 * documents)


def _memory_and_kernels(plan: RunPlan) -> list[str]:
    s = plan.settings
    flags = [] if s.pr == "fp32" else [f"--{s.pr}"]
    if s.ac == "full":
        flags += ["--recompute-granularity", "full"]
        flags += ["--recompute-method", "uniform", "--recompute-num-layers", "1"]
    elif s.ac == "sel":
        flags += ["--recompute-granularity", "selective"]
    if s.te != "auto":
        flags += ["--transformer-impl", "transformer_engine" if s.te == "true" else "local"]
    if plan.size.is_moe and not s.use_gemm:
        flags.append("--sequential-experts")
    if plan.size.is_moe and s.token_dropping:
        flags += ["--moe-expert-capacity-factor", repr(s.train_capacity_factor)]
    return flags


def _run_folder(plan: RunPlan) -> list[str]:
    s, folder = plan.settings, plan.run_dir
    checkpoint = str(folder / "checkpoint")
    flags = ["--run-dir", str(folder), "--load", checkpoint, "--ckpt-format", "torch_dist"]
    # Megatron would write the last checkpoint of a finished run over itself, and lose it to a full disk or a kill.
    if s.save_interval > 0 and not is_finished(plan):
        flags += ["--save", checkpoint, "--save-interval", str(s.save_interval)]
    flags += ["--eval-interval", str(s.eval_interval), "--eval-iters", str(s.eval_iters)]
    flags += ["--log-interval", str(s.log_interval), "--tensorboard-dir", str(folder / "tensorboard")]
    source = pretrained_folder(plan)
    return flags + (["--pretrained-checkpoint", str(source)] if source is not None else [])


def torchrun_command(plan: RunPlan) -> list[str]:
    """The whole command of this node: torchrun, our entry module, its arguments."""
    s = plan.settings
    command = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={s.nnodes}"]
    command.append(f"--nproc-per-node={plan.processes_per_node}")
    if s.nnodes == 1 and s.master_port is None:
        # A free port of this machine: two runs on one node do not meet, and no host name has to resolve.
        command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
    else:
        address = s.master_addr or "127.0.0.1"
        command += [
            f"--node-rank={s.node_rank}",
            f"--master-addr={address}",
            f"--master-port={s.master_port or DEFAULT_PORT}",
        ]
    return [*command, "-m", "linear_moe.training.pretrain", *training_arguments(plan)]


def shell_text(command: list[str]) -> str:
    """The command as a person would type it, one flag per line."""
    lines: list[str] = []
    for word in command:
        if word.startswith("--") or not lines:
            lines.append(shlex.quote(word))
        else:
            lines[-1] += " " + shlex.quote(word)
    return " \\\n    ".join(lines)
