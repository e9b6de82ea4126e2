"""What a person reads before a run: model, layout, batch, data, where it goes, and what was decided for them."""

from pathlib import Path

from linear_moe.data.indexed import read_index
from linear_moe.launch.check_layout import draw_stages
from linear_moe.launch.cluster import cpu_cores
from linear_moe.launch.environment import RunSettings, default_mixer
from linear_moe.launch.megatron_args import DEFAULT_PORT, training_arguments
from linear_moe.launch.plan import MOCK_DATA, RunPlan, registered_mixers
from linear_moe.launch.resume import (
    changes_since,
    checkpoint_iteration,
    has_another_tokenizer,
    is_finished,
    pretrained_folder,
)
from linear_moe.model.families import estimate_parameters
from linear_moe.model.pattern import canonical_mixer, pattern_of


def header(plan: RunPlan) -> str:
    """The start of a run in a few aligned lines."""
    rows = [
        ("linear_moe", _model(plan)),
        ("parameters", _parameters(plan)),
        ("layout", _layout(plan)),
        ("batch", _batch(plan)),
        ("schedule", _schedule(plan)),
        ("data", _data(plan)),
        ("run", _run(plan)),
        *(("note", note) for note in notes(plan)),
    ]
    return "\n".join(f"{name:<11} {text}" for name, text in rows)


def notes(plan: RunPlan) -> list[str]:
    """What was decided for the person, and what it costs: one line each."""
    s = plan.settings
    found = [] if plan.instructions is None else plan.instructions.notes(s.seq_len)
    if is_finished(plan):
        found.append(
            "nothing is left to train, and nothing will be saved: TRAIN_ITERS goes on, another RUN_NAME begins anew."
        )
    if changed := changes_since(plan, training_arguments(plan)):
        found.append(f"changed since this run was saved: {'; '.join(changed)}. Another RUN_NAME begins anew.")
    if plan.from_checkpoint:
        found.append(f"those of PRETRAIN_CHECKPOINT_PATH: {', '.join(plan.from_checkpoint)}.")
    if s.vocab_size is not None and plan.tokenizer is not None and "VOCAB_SIZE" not in plan.from_checkpoint:
        found.append(f"VOCAB_SIZE={s.vocab_size} does nothing: TOKENIZER has {plan.vocab_size} tokens.")
    if _has_idle_mixer(plan):
        pattern = s.hybrid_override_pattern or s.layer_type_list
        found.append(f"LA_MODULE={s.la_module} does nothing: no layer of {pattern} asks for it.")
    found += _idle_variables_of_experts(plan)
    source = pretrained_folder(plan)
    is_new = checkpoint_iteration(plan.run_dir / "checkpoint") is None
    if is_new and source is not None and has_another_tokenizer(plan, source.parent):
        found.append(f"another tokenizer than {source.parent}/tokenizer: these weights know other tokens.")
    if plan.sequence_parallel and not s.sp:
        found.append("SP is on: Megatron trains experts under TP with sequence parallel only.")
    if s.nnodes > 1:
        port = s.master_port or DEFAULT_PORT
        found.append(
            f"{s.nnodes} nodes meet at {s.master_addr}:{port}: no step is done before all are there."
        )
    if s.sp and s.tp == 1:
        found.append("SP=true does nothing with TP=1.")
    if plan.on_cpu and s.etp is None and s.ep > 1 and s.tp > 1:
        found.append("ETP is 1 on CPU with EP > 1: gloo cannot gather tensors of different sizes.")
    if s.dataset_path == MOCK_DATA:
        found.append(
            "mock data: counting sequences, for trying things out. DATASET_PATH=<prefix> trains on text."
        )
    if plan.on_cpu and s.pr != "fp32":
        found.append(f"PR={s.pr} is slow without a GPU; PR=fp32 is what CPUs do best.")
    if plan.on_cpu and plan.size.hidden_size > 512:
        found.append(f"{plan.size_name} on a CPU takes minutes per step; MODEL_SIZE=demo is made for it.")
    return found


def _idle_variables_of_experts(plan: RunPlan) -> list[str]:
    """Variables of experts of which nothing follows; only what is not the default, which every run script sets."""
    s = plan.settings
    model = f"{plan.family.name} {plan.size_name} has no experts"
    idle = {} if plan.size.is_moe else {"USE_GEMM": model, "ETP": model, "MOE_AUX_LOSS_COEFF": model}
    if not s.token_dropping:
        idle["TRAIN_CAPACITY_FACTOR"] = "it is the room of an expert with TOKEN_DROPPING=true"
    return [
        f"{name}={_text(value)} does nothing: {why}."
        for name, why in idle.items()
        if (value := getattr(s, name.lower())) != getattr(RunSettings, name.lower())
    ]


def _text(value: float | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}"


def _has_idle_mixer(plan: RunPlan) -> bool:
    """Whether LA_MODULE, as far as one can see that it is set, names a mixer of no layer."""
    s, known = plan.settings, registered_mixers(plan.settings.mixer_modules)
    if s.la_module == default_mixer(plan.family.name) or "LA_MODULE" in plan.from_checkpoint:
        return False
    names = [name for name in s.la_module.split(",") if name.strip()]
    try:
        return not {canonical_mixer(name, known) for name in names} & {*plan.kinds}
    except ValueError:
        return True


def _model(plan: RunPlan) -> str:
    counts = " + ".join(f"{plan.kinds.count(kind)} {kind}" for kind in dict.fromkeys(plan.kinds))
    experts = "dense"
    if plan.size.is_moe:
        experts = f"{plan.size.num_experts} experts top-{plan.size.moe_router_topk}"
        experts += f" after {plan.size.first_dense_layers} dense" if plan.size.first_dense_layers else ""
    pattern = pattern_of(plan.kinds)
    times = len(plan.kinds) // len(pattern)
    shown = f"{pattern} x {times}" if times > 1 else pattern
    return f"{plan.family.name} {plan.size_name}   {shown}: {counts}, {experts}"


def _parameters(plan: RunPlan) -> str:
    total, active = estimate_parameters(plan.size, plan.kinds, plan.padded_vocab_size)
    each = f", {_count(active)} active per token" if active != total else ""
    return f"about {_count(total)}{each}; embedding {plan.padded_vocab_size} x {plan.size.hidden_size}"


def _layout(plan: RunPlan) -> str:
    s = plan.settings
    device = "CPU process(es)" if plan.on_cpu else "GPU(s)"
    parts = [f"{plan.world} {device} = TP {s.tp}{' + SP' if plan.sequence_parallel else ''} x PP {s.pp}"]
    if s.vpp > 1:
        parts[0] += f" (VPP {s.vpp})"
    parts[0] += f" x CP {s.cp} x DP {plan.dp}"
    if plan.size.is_moe and (s.ep > 1 or plan.etp > 1):
        parts.append(f"experts EP {s.ep} x ETP {plan.etp}")
    if s.pp > 1:
        parts.append(f"stages {draw_stages(plan)}")
    return ", ".join(parts)


def _batch(plan: RunPlan) -> str:
    s = plan.settings
    return (
        f"{plan.global_batch_size} sequences of {s.seq_len} = {s.tokens_per_step} tokens a step "
        f"(micro batch {s.batch_size} x DP {plan.dp} x {plan.micro_batches})"
    )


def _schedule(plan: RunPlan) -> str:
    s = plan.settings
    epochs = "" if plan.instructions is None else f" = {plan.instructions.epochs_text(s.iterations)}"
    return (
        f"{s.iterations} steps{epochs} = {plan.tokens_text()} tokens, {s.pr}, lr {s.lr:g} -> {s.min_lr:g} cosine, "
        f"{s.warmup_iterations} warm-up step(s)"
    )


def _data(plan: RunPlan) -> str:
    source = "mock" if plan.settings.dataset_path == MOCK_DATA else plan.settings.dataset_path
    tokenizer = plan.tokenizer.path if plan.tokenizer is not None else "null"
    if plan.instructions is not None:
        return f"{plan.instructions.text()}, tokenizer {tokenizer} ({plan.vocab_size} tokens)"
    packed = ", documents kept apart" if plan.settings.pack else ""
    return f"{source}{_epochs(plan)}, tokenizer {tokenizer} ({plan.vocab_size} tokens){packed}"


def _epochs(plan: RunPlan) -> str:
    """How often the token files are read, a blend in total; what evaluation holds out is counted, too."""
    if not plan.prefixes or not all(Path(prefix + ".idx").exists() for prefix in plan.prefixes):
        return ""
    tokens = sum(read_index(prefix).num_tokens for prefix in plan.prefixes)
    epochs = plan.tokens / tokens
    shown = f"{epochs:.3g}" if epochs < 999.5 else f"{epochs:,.0f}"
    return f" = {shown} epoch(s) of {_count(tokens)} tokens{' in total' if len(plan.prefixes) > 1 else ''}"


def _run(plan: RunPlan) -> str:
    step = checkpoint_iteration(plan.run_dir / "checkpoint")
    if step is not None:
        return f"{plan.run_dir}, resumed at step {step} of {plan.settings.iterations}"
    source = pretrained_folder(plan)
    return f"{plan.run_dir}, new" + (f", weights from {source}" if source is not None else "")


def _count(number: int) -> str:
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{number / scale:.2f}{unit}"
    return str(number)


def default_threads(plan: RunPlan) -> int:
    """CPU threads of each process: the cores this launcher may use, shared out."""
    return max(1, cpu_cores() // plan.processes_per_node) if plan.on_cpu else 1


def default_variables(plan: RunPlan) -> dict[str, str]:
    """Of each process, where a person sets no others.

    One queue of kernels for all streams is what Megatron asks for with TP or CP, before Blackwell; without them several
    let a step's figures be read while the optimizer runs (``linear_moe/training/figures_stream.py``).
    """
    of_queues = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"} if plan.settings.tp > 1 or plan.settings.cp > 1 else {}
    return {"OMP_NUM_THREADS": str(default_threads(plan)), **of_queues}
