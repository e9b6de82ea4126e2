"""A step of generation does nothing that a CUDA graph cannot hold, checked without one: it reads no value.

On a CPU the same operations run as on a GPU, but for the grouped GEMM of experts, which stands in here as a product
with all experts. The capture itself is in test_generate_gpu.py.
"""

import functools

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from linear_moe import lsm
from tests.inference.models import prompts, random_family, random_model

NAMES = lsm.names()
FORBIDDEN = (
    *("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "equal", "is_nonzero"),
    *("repeat_interleave.Tensor", "_assert_async"),
)
"""Reads a value on the host, or has a shape that follows from values."""
WAITING = ("tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__")
"""The same as methods, which a CPU answers without an operation."""


MAKERS = ("arange", "zeros", "ones", "empty", "full", "eye", "linspace", "rand", "randn")
"""Make a tensor on the host unless they are told where."""


class Placed(TorchFunctionMode):
    """Every tensor is made where somebody says, which on a CPU would not show."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in MAKERS and "device" not in (kwargs or {}):
            raise AssertionError(f"{name}{args} without a device in a step")
        return func(*args, **(kwargs or {}))


def refused(*args, **kwargs):
    raise AssertionError(f"{args[:2]} in a step")


class Seen(TorchDispatchMode):
    """The names of all operations."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(str(func).removeprefix("aten."))
        if any(isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in _indices(func, args)):
            self.names.add("index by bool")
        return func(*args, **(kwargs or {}))


def _indices(func, args):
    return args[1] if str(func).startswith(("aten.index.", "aten.index_put")) else []


def everywhere(x, weight, ends, sums=None):
    """The grouped GEMM without counts on the host: every row with every expert, and the right one taken."""
    row = torch.arange(x.shape[0], device=x.device)
    expert = torch.searchsorted(ends, row.to(ends.dtype), right=True)
    outputs = torch.einsum("mi,eoi->emo", x, weight)
    return outputs[expert.clamp(max=len(weight) - 1), row]


def step_operations(rank, world, kinds, extra, family=None):
    import linear_moe.inference.experts
    import linear_moe.kernels.checks
    import linear_moe.kernels.grouped_linear
    import linear_moe.model.experts
    from linear_moe.inference.decoder import Decoder
    from linear_moe.inference.loop import Loop
    from linear_moe.inference.sampling import Sampling

    of = functools.partial(random_family, *family) if family else random_model
    loaded = of(kinds, *extra, dtype=torch.float32)
    seen, modules = Seen(), (linear_moe.kernels.grouped_linear, linear_moe.model.experts)
    with pytest.MonkeyPatch.context() as patch:
        for module in (*modules, linear_moe.inference.experts):
            patch.setattr(module, "can_group", lambda *tensors: True)
        for module in modules:
            patch.setattr(module, "grouped_linear", everywhere)
        assert linear_moe.inference.experts.waits_for_host(loaded.model) is None
        decoder = Decoder(loaded.model, 3, 100)
        options = {"seeds": [1, 2, 3], "ends": [5], "steps": 9, "vocab_size": 120}
        loop = Loop(decoder, Sampling(0.8, 20, 0.9), **options)
        loop.start(decoder.read([row[: 4 + i] for i, row in enumerate(prompts(3, 9))]))
        loop.next()  # rotary tables and the like are made once
        decoder.context.prepare_step()
        for name in WAITING:
            patch.setattr(torch.Tensor, name, functools.partialmethod(refused, name))
        patch.setattr(linear_moe.kernels.checks, "check_decay", lambda *arguments: None)  # on CPUs only
        for name in ("tensor", "as_tensor", "from_numpy"):  # copies numbers from the host
            patch.setattr(torch, name, functools.partial(refused, name))
        with Placed(), seen:
            loop._advance()
    return sorted(seen.names)


@pytest.mark.parametrize("kinds", [NAMES[i::3] for i in range(3)], ids=range(3))
def test_a_step_reads_nothing_on_the_host(gloo, kinds):
    extra = ("--gated-deltanet-conv-size", "4", "--mom-gla-conv-size", "4")
    shared = ("--moe-shared-expert-intermediate-size", "32")
    names = gloo(1, step_operations, [*kinds, "softmax"], (*extra, *shared))[0]
    assert (
        "scaled_dot_product_attention" in str(names)
        or "_scaled_dot_product" in str(names)
        or "bmm" in str(names)
    )
    assert not forbidden(names), names


def test_nor_does_latent_attention(gloo):
    family = ("deepseek_v2", "A21B")
    names = gloo(1, step_operations, ["gla", "softmax", "softmax"], (), family)[0]
    assert not forbidden(names), names


def forbidden(names):
    return [x for x in names if x.split(".")[0] in FORBIDDEN or x in (*FORBIDDEN, "index by bool")]


def streams_of_loops(rank, world):
    """Streams of warm-ups and captures, and which waits for which, of two loops whose caches grow."""
    from contextlib import contextmanager
    from types import SimpleNamespace

    from linear_moe.inference import loop
    from linear_moe.inference.decoder import Decoder
    from linear_moe.inference.sampling import Sampling

    loaded, streams = random_model(["gla", "softmax"], moe=False, dtype=torch.float32), []

    @contextmanager
    def noted(what, stream):
        streams.append((what, stream))
        yield

    class Stream:
        def wait_stream(self, other):
            streams.append(("wait", self, other))

    def captured(graph, *, stream=None, capture_error_mode):
        return noted("capture", stream)

    here = Stream()
    loop._aside.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_why_no_graph", lambda decoder, graph: None)
        patch.setattr(torch.cuda, "Stream", lambda *device: Stream())
        patch.setattr(torch.cuda, "current_stream", lambda: here)
        patch.setattr(torch.cuda, "stream", functools.partial(noted, "warm-up"))
        patch.setattr(torch.cuda, "graph", captured)
        patch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
        for _ in range(2):
            decoder = Decoder(loaded.model, 1, 100)
            steps = loop.Loop(decoder, Sampling(), seeds=[0], ends=(), steps=9, vocab_size=120)
            steps.start(decoder.read(prompts(1, 60)))
            for _ in range(8):
                steps.next()
    loop._aside.cache_clear()
    numbers: dict[int, int] = {id(here): 0}
    return [(what, *(numbers.setdefault(id(x), len(numbers)) for x in used)) for what, *used in streams]


def test_every_warm_up_and_capture_is_on_one_stream(gloo):
    """cuBLAS keeps a workspace for each that it has seen. A step there waits for the one before, the next for it."""
    one = [("wait", 1, 0), ("warm-up", 1), ("wait", 0, 1), ("capture", 1)]
    assert gloo(1, streams_of_loops)[0] == one * 4


def compiled_parts(rank, world):
    """Switches of a CUDA machine, whose defaults have no reason to differ from Megatron's, that call torch.compile."""
    from linear_moe.inference.rebuild import single_process_arguments
    from linear_moe.training import arguments, engine
    from tests.inference.models import argv

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.cpu, "needed", lambda: False)
        args = single_process_arguments(argv(["gla", "softmax"], moe=False), padded_vocab_size=128)
        config = arguments.model_config(args).transformer
    return {name: getattr(config, name) for name in ("bias_dropout_fusion", "bias_activation_fusion")}


def test_nothing_is_compiled_by_torch_for_every_shape(gloo):
    """Prompts have all lengths."""
    assert not any(gloo(1, compiled_parts)[0].values())


def reasons(rank, world):
    from linear_moe.inference import experts

    kinds = {"dense": (["gla"], False), "experts": (["gla"], True), "memories": (["mom_gla"], False)}
    models = {name: random_model(case[0], moe=case[1]).model for name, case in kinds.items()}
    found = {name: experts.waits_for_host(model) for name, model in models.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experts, "FEW", 3)
        found["many memories"] = experts.waits_for_host(models["memories"])
    return found


def test_what_runs_one_after_the_other_is_not_captured(gloo):
    found = gloo(1, reasons)[0]
    assert found["dense"] is None and found["memories"] is None
    assert "experts in torch.float64" in found["experts"]
    assert "more than 3 memories in torch.float64" in found["many memories"]
