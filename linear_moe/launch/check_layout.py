"""Checks of the layout: heads, stages, sequence, experts, processes, batch. All arithmetic, nothing is opened."""

from linear_moe.launch.errors import PreflightError
from linear_moe.launch.plan import RunPlan
from linear_moe.model.pattern import pattern_of


def check_heads(plan: RunPlan) -> None:
    """TP divides heads, key/value groups, feed-forward widths and, with latent attention, the compressed widths."""
    size, tp = plan.size, plan.settings.tp
    if plan.settings.etp is not None and size.is_moe and _expert_width(plan) % plan.etp:
        raise PreflightError(
            f"ETP={plan.etp} does not fit {plan.family.name} {plan.size_name}.",
            f"it has to divide the width of an expert, {_expert_width(plan)}.",
            f"ETP={nearest(plan.etp, divisors(_expert_width(plan)))}, or ETP= (empty): TP",
        )
    legal = [n for n in range(1, size.num_attention_heads + 1) if _tp_fits(plan, n)]
    if tp not in legal:
        widths = [_expert_width(plan)] if size.is_moe else []
        groups = f"to fit {size.num_query_groups} key/value groups"
        if size.has_latent_attention:
            groups = f"the compressed widths {_words(_compressed_widths(plan))}"
        widths += _dense_widths(plan)
        feed_forward = f" and the feed-forward width {_words(widths)}" if widths else ""
        raise PreflightError(
            f"tensor parallel {tp} does not fit {plan.family.name} {plan.size_name}.",
            f"TP has to divide {size.num_attention_heads} heads{feed_forward}, and {groups}.",
            f"TP={nearest(tp, legal)} (legal: {_words(legal)})",
        )


def _tp_fits(plan: RunPlan, tp: int) -> bool:
    size = plan.size
    divided = [size.num_attention_heads, *_compressed_widths(plan), *_dense_widths(plan)]
    if any(width % tp for width in divided) or (
        size.is_moe and _expert_width(plan) % (plan.settings.etp or tp)
    ):
        return False
    return size.num_query_groups % tp == 0 or tp % size.num_query_groups == 0


def _expert_width(plan: RunPlan) -> int:
    return plan.size.moe_ffn_hidden_size or plan.size.ffn_hidden_size


def _dense_widths(plan: RunPlan) -> list[int]:
    """Feed-forward widths that every token passes: of dense layers, and of the shared expert."""
    shared = plan.size.moe_shared_expert_intermediate_size if plan.size.is_moe else None
    has_dense = plan.size.has_feed_forward and not all(plan.size.moe_layers())
    dense = [plan.size.ffn_hidden_size] if has_dense else []
    return dense + ([shared] if shared else [])


def _compressed_widths(plan: RunPlan) -> list[int]:
    size = plan.size
    if not size.has_latent_attention:
        return []
    assert size.kv_lora_rank is not None and size.qk_pos_emb_head_dim is not None
    return [*([size.q_lora_rank] if size.q_lora_rank else []), size.kv_lora_rank + size.qk_pos_emb_head_dim]


def check_pipeline(plan: RunPlan) -> None:
    """PP and VPP cut the layers into equal stages."""
    s, layers = plan.settings, plan.size.num_layers
    if s.vpp > 1 and s.pp == 1:
        raise PreflightError(
            f"VPP={s.vpp} needs a pipeline, but PP=1.",
            "virtual stages interleave the pipeline stages of several ranks.",
            f"PP=2 VPP={s.vpp}, or VPP=1",
        )
    stages = s.pp * s.vpp
    if layers % stages:
        legal = [n for n in range(1, layers + 1) if layers % (n * s.vpp) == 0]
        virtual = f" x VPP {s.vpp}" if s.vpp > 1 else ""
        raise PreflightError(
            f"{layers} layers do not cut into PP {s.pp}{virtual} = {stages} equal stages: {draw_stages(plan)}",
            "every stage holds the same number of layers.",
            f"PP={nearest(s.pp, legal) if legal else 1} (legal: {_words(legal or [1])})"
            + (", or VPP=1" if virtual else ""),
        )


def draw_stages(plan: RunPlan) -> str:
    """The pattern cut into pipeline stages: `LLLN|LLLN`; a stage that comes out short is marked `!`."""
    pattern = pattern_of(plan.kinds)
    full = pattern * (len(plan.kinds) // len(pattern))
    stages = plan.settings.pp * plan.settings.vpp
    per_stage = -(-len(full) // stages)
    cut = [full[i * per_stage : (i + 1) * per_stage] for i in range(stages)]
    return "|".join(part if len(part) == per_stage else part + "!" for part in cut)


def check_sequence(plan: RunPlan) -> None:
    """CP and sequence parallel cut the sequence into equal pieces; the family knows positions that far."""
    s = plan.settings
    pieces = (2 * s.cp if s.cp > 1 else 1) * (s.tp if plan.sequence_parallel else 1)
    if s.seq_len % pieces:
        why = f"softmax layers cut each sequence into 2 x CP = {2 * s.cp} chunks" if s.cp > 1 else ""
        if plan.sequence_parallel:
            why += (", and " if why else "") + f"sequence parallel cuts it over TP = {s.tp}"
        lower, upper = s.seq_len // pieces * pieces, -(-s.seq_len // pieces) * pieces
        raise PreflightError(
            f"SEQ_LEN={s.seq_len} is not divisible by {pieces}.",
            f"{why}.",
            f"SEQ_LEN={upper}" + (f" or SEQ_LEN={lower}" if lower else ""),
        )
    if s.seq_len > plan.size.max_position_embeddings:
        raise PreflightError(
            f"SEQ_LEN={s.seq_len} is longer than {plan.family.name} allows.",
            f"its positions end at {plan.size.max_position_embeddings}.",
            f"SEQ_LEN={plan.size.max_position_embeddings}, or EXTRA_ARGS='--max-position-embeddings {s.seq_len}'",
        )


def check_experts(plan: RunPlan) -> None:
    """EP divides the experts, and a dense model has none to divide."""
    ep, experts = plan.settings.ep, plan.size.num_experts
    if experts is None:
        if ep > 1:
            raise PreflightError(
                f"EP={ep}, but {plan.family.name} {plan.size_name} has no experts.",
                "expert parallel deals out the experts of a mixture.",
                "EP=1",
            )
        return
    if not _expert_width(plan):
        raise PreflightError(
            f"the {experts} experts of {plan.family.name} {plan.size_name} have no width.",
            "without one of their own it is that of the feed-forward blocks, which this model has not.",
            f"EXTRA_ARGS='--num-experts {experts} --moe-ffn-hidden-size {2 * plan.size.hidden_size}'",
        )
    if experts % ep:
        legal = divisors(experts)
        raise PreflightError(
            f"{experts} experts cannot be dealt out to EP={ep}.",
            "every rank holds the same number of experts.",
            f"EP={nearest(ep, legal)} (legal: {_words(legal)})",
        )
    if plan.on_cpu and ep > 1 and plan.etp > 1:
        raise PreflightError(
            f"EP={ep} with ETP={plan.etp} does not run on CPU.",
            "gloo cannot gather tensors of different sizes, which the token dispatcher needs here.",
            "ETP=1",
        )


def check_routing(plan: RunPlan) -> None:
    """A token finds as many experts as it visits, and the experts have room for tokens."""
    size, s = plan.size, plan.settings
    if size.num_experts is None:
        if s.token_dropping:
            raise PreflightError(
                f"TOKEN_DROPPING=true, but {plan.family.name} {plan.size_name} has no experts.",
                "it is experts that drop tokens for which they have no room.",
                "TOKEN_DROPPING=false, or a model with experts (MOE, MODEL_SIZE)",
            )
        return
    experts, open_groups = size.num_experts, size.moe_router_group_topk or 1
    groups = (size.moe_router_group_topk and size.moe_router_num_groups) or 1  # one, and open: no limit
    if experts % groups:
        raise PreflightError(
            f"{experts} experts do not make {groups} equal groups.",
            f"the router of {plan.family.name} {plan.size_name} chooses groups, then experts in these.",
            f"EXTRA_ARGS='--num-experts {-(-experts // groups) * groups}', or another --moe-router-num-groups",
        )
    reached = experts // groups * min(open_groups, groups)
    if size.moe_router_topk > reached:
        where = f" in the {open_groups} groups open to it" if reached < experts else ""
        raise PreflightError(
            f"a token cannot visit {size.moe_router_topk} of {reached} experts{where}.",
            "each of those that it visits is another one.",
            f"EXTRA_ARGS='--moe-router-topk {reached}' or less, or more experts with --num-experts",
        )
    if s.token_dropping and not s.train_capacity_factor:
        raise PreflightError(
            f"TRAIN_CAPACITY_FACTOR={s.train_capacity_factor:g} drops every token.",
            "an expert takes that many times its even share of the tokens.",
            "TRAIN_CAPACITY_FACTOR=1.25, or TOKEN_DROPPING=false",
        )


def check_world(plan: RunPlan) -> None:
    """The processes make up whole copies of the layout, for the dense part and for the experts."""
    s = plan.settings
    machine = f"{s.nnodes} node(s) x {plan.processes_per_node} = {plan.world} process(es)"
    dense = plan.model_parallel
    if plan.world % dense:
        raise PreflightError(
            f"{machine} cannot hold TP {s.tp} x PP {s.pp} x CP {s.cp} = {dense}.",
            "the number of processes has to be a multiple of that product; what is left over is data parallel.",
            f"{_enough_processes(plan, dense)}, or a smaller TP, PP or CP",
        )
    expert = plan.etp * s.ep * s.pp
    if plan.size.num_experts is not None and plan.world % expert:
        legal = [
            n
            for n in range(1, s.ep)
            if plan.size.num_experts % n == 0 and plan.world % (expert // s.ep * n) == 0
        ]
        smaller = f"EP={legal[-1]}" if legal else "ETP=1"
        raise PreflightError(
            f"{machine} cannot hold ETP {plan.etp} x EP {s.ep} x PP {s.pp} = {expert}.",
            "the experts are laid out over the same processes, and need a whole number of copies.",
            f"{smaller}, or {_enough_processes(plan, expert)}",
        )


def _enough_processes(plan: RunPlan, product: int) -> str:
    per_node = plan.processes_per_node
    if not plan.on_cpu and product % per_node == 0:
        return f"NNODES={product // per_node}, or GPUS_PER_NODE={product} on one node"
    return f"GPUS_PER_NODE={product}"


def check_batch(plan: RunPlan) -> None:
    """The global batch is a whole number of micro batches on every data-parallel rank, enough of them to interleave."""
    s = plan.settings
    step = s.batch_size * plan.dp
    if plan.global_batch_size % step:
        upper = -(-plan.global_batch_size // step) * step
        raise PreflightError(
            f"GLOBAL_BATCH_SIZE={plan.global_batch_size} is not divisible by BATCH_SIZE {s.batch_size} x DP {plan.dp}"
            f" = {step}.",
            f"every data-parallel rank takes whole micro batches of {s.batch_size} sequences.",
            f"GLOBAL_BATCH_SIZE={upper}"
            + (", or BATCH_SIZE=1" if plan.global_batch_size % plan.dp == 0 else ""),
        )
    if s.vpp > 1 and plan.micro_batches % s.pp:
        upper = -(-plan.micro_batches // s.pp) * s.pp * step
        raise PreflightError(
            f"{plan.micro_batches} micro batches a step do not interleave over PP={s.pp} with VPP={s.vpp}.",
            "the interleaved schedule handles micro batches in groups of PP.",
            f"GLOBAL_BATCH_SIZE={upper}, or VPP=1",
        )


def check_schedule(plan: RunPlan) -> None:
    """The warm-up ends before the run does, and the learning rate does not rise afterwards."""
    s = plan.settings
    if s.warmup_iterations >= s.iterations and s.warmup_iterations > 0:
        raise PreflightError(
            f"the warm-up takes {s.warmup_iterations} steps and the run {s.iterations}.",
            "the learning rate has to reach LR and come down again.",
            f"WARMUP_ITERS={s.iterations // 10}",
        )
    if s.min_lr > s.lr:
        raise PreflightError(
            f"MIN_LR={s.min_lr} is above LR={s.lr}.",
            "the cosine falls from LR to MIN_LR.",
            f"MIN_LR={s.lr / 10:g}",
        )


def check_nodes(plan: RunPlan) -> None:
    """Several nodes know each other: an address, a port and a number for each."""
    s = plan.settings
    if s.master_port is not None and s.master_port > 65535:
        raise PreflightError(
            f"MASTER_PORT={s.master_port} is no port.",
            "the numbers of ports end at 65535.",
            "MASTER_PORT=29500",
        )
    if s.nnodes > 1 and s.master_addr is None:
        raise PreflightError(
            f"NNODES={s.nnodes}, but MASTER_ADDR is not set.",
            "the nodes meet at the address of node 0.",
            "MASTER_ADDR=<host of node 0> NODE_RANK=<number of this node>, or srun --ntasks-per-node=1",
        )
    if s.node_rank >= s.nnodes:
        raise PreflightError(
            f"NODE_RANK={s.node_rank}, but NNODES={s.nnodes}.",
            "nodes are numbered from 0.",
            f"NODE_RANK={s.nnodes - 1}, or NNODES={s.node_rank + 1}",
        )


def check_devices(plan: RunPlan) -> None:
    """There are as many CUDA devices as processes; Transformer Engine is there when asked for."""
    wanted, devices = plan.settings.gpus_per_node, plan.cuda_devices
    if wanted is not None and 0 < devices < wanted:
        raise PreflightError(
            f"GPUS_PER_NODE={wanted}, but this node has {devices} CUDA device(s).",
            "every process needs a device of its own.",
            f"GPUS_PER_NODE={devices}, or CUDA_VISIBLE_DEVICES= (empty) to run {wanted} processes on CPU",
        )
    if plan.settings.te == "true":
        import importlib.util

        if importlib.util.find_spec("transformer_engine") is None:
            raise PreflightError(
                "TE=true, but Transformer Engine is not installed.",
                "it is optional: everything also runs without it.",
                "TE=auto, or pip install -e '.[te]' in the repository",
            )


def divisors(number: int) -> list[int]:
    """All numbers that divide one."""
    return [n for n in range(1, number + 1) if number % n == 0]


def nearest(wanted: int, legal: list[int]) -> int:
    """The legal number that is nearest to what was wanted; the larger of two."""
    return min(legal, key=lambda n: (abs(n - wanted), -n))


def _words(values: list[int]) -> str:
    return ", ".join(str(value) for value in values)
