"""One forward and backward pass of MODEL_SIZE=A0.3B with every mixer, in float32 and in bfloat16, on one device.

All layers are the mixer. Per mixer: both losses, whether every gradient is finite, how far bfloat16's gradients are
from those of float32 (same weights, same tokens), what stays float32, and seconds and memory of a pass. Beside it, how
far float32's own gradients move when nothing but the weights is rounded to bfloat16: what a top-k of experts or
memories that flips costs anyhow.

    PYTHONPATH=. python benchmarks/mixers_step.py OUTPUT.json [--mixers gla ...]
    PYTHONPATH=. python benchmarks/mixers_step.py OUTPUT.json --layers 3 --tokens 512     # a CPU with 16 GiB

A run that is started again with the same OUTPUT.json and sizes leaves out what it holds.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import gc
import json
import os
import shlex
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from linear_moe.training import cpu

if cpu.needed():
    cpu.activate()  # before Megatron looks for a device

import torch

from linear_moe import lsm
from linear_moe.model.mixer_layer import MixerLayer

ROOT = Path(__file__).parents[1]


def given() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path, metavar="OUTPUT.json")
    parser.add_argument("--mixers", nargs="+", help="default: all, and mixtures over gla and gated_deltanet")
    parser.add_argument("--layers", type=int, default=12, help="of the model; A0.3B has 12")
    parser.add_argument("--tokens", type=int, default=2048, help="of the one sequence")
    return parser.parse_args()


def command_line(tokens: int) -> list[str]:
    """What the run script would start for this size, without experts' or anybody's recomputation."""
    variables = {
        **{"LINEAR_MOE_DRY_RUN": "1", "MODEL_SIZE": "A0.3B", "LA_MODULE": "gla", "LAYER_TYPE_LIST": "L"},
        **{"PR": "fp32", "SEQ_LEN": str(tokens), "BATCH_SIZE": "1", "GLOBAL_BATCH_SIZE": "1", "AC": "none"},
        **{
            "DATASET_PATH": "mock",
            "TRAIN_ITERS": "1",
            "PYTHON": sys.executable,
            "OUTPUT_BASEPATH": "/tmp/step",
        },
    }
    script = str(ROOT / "examples/linear_moe_qwen2/run_pretrain_qwen.sh")
    run = subprocess.run(["sh", script], env=os.environ | variables, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stdout + run.stderr
    return shlex.split(run.stdout.replace("\\\n", " ").split("linear_moe.training.pretrain", 1)[1])


def prepare(tokens: int, layers: int) -> Any:
    """One process's groups, and the model config."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from linear_moe.training import arguments
    from linear_moe.training.pretrain import prepare_arguments

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29611", "RANK": "0", "WORLD_SIZE": "1"}
    torch.distributed.init_process_group("gloo" if cpu.needed() else "nccl", rank=0, world_size=1)
    config = arguments.model_config(prepare_arguments(command_line(tokens)))
    config.transformer.num_layers = layers
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1234)
    return config


def build(config: Any, mixer: str) -> Any:
    """The whole model with every layer this mixer, float32."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    from linear_moe.model.builder import LinearMoEBuilder

    transformer = copy.copy(config.transformer)
    transformer.layer_kinds = [mixer] * transformer.num_layers
    transformer.mixer_options = {}
    transformer._prepare(mixer)
    torch.manual_seed(1)
    model_config = dataclasses.replace(config, transformer=transformer)
    return LinearMoEBuilder(model_config).build_model(ProcessGroupCollection.use_mpu_process_groups())


def in_bfloat16(model: Any) -> Any:
    """As Megatron's Float16Module makes it: the config says so, and what must stay float32 does."""
    model.zero_grad(set_to_none=True)
    for module in model.modules():
        if hasattr(module, "config"):
            module.config.bf16, module.config.params_dtype = True, torch.bfloat16
    return model.bfloat16()


def one_pass(model: Any, num_tokens: int) -> dict[str, Any]:
    """Loss, with gradients left at the parameters; seconds of the second pass."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 150_000, (1, num_tokens + 1), generator=generator).cuda()
    positions = torch.arange(num_tokens, device=tokens.device)[None]
    seconds = loss = None
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        start = time.perf_counter()
        loss = (
            model(tokens[:, :-1].contiguous(), positions, None, labels=tokens[:, 1:].contiguous())
            .float()
            .mean()
        )
        loss.backward()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    return {"loss": loss.item(), "seconds": seconds}


def watch(model: Any) -> dict[str, set[str]]:
    """Dtypes of the gates and memories of every layer, as they pass."""
    seen: dict[str, set[str]] = {"gates": set(), "memory": set()}
    for layer in (module for module in model.modules() if isinstance(module, MixerLayer)):
        mixer = getattr(layer.mixer, "core", layer.mixer)
        gates, scan = mixer.gates, mixer.scan

        def watched_gates(*arguments: Any, gates: Any = gates) -> Any:
            gated = gates(*arguments)
            exact = [x for key, x in gated.items() if key.startswith("log_decay") or key == "beta"]
            seen["gates"].update(str(x.dtype) for x in exact)
            return gated

        def watched_scan(*, scan: Any = scan, **arguments: Any) -> Any:
            o, memory = scan(**arguments)
            seen["memory"].update(str(m.dtype) for m in memory)
            return o, memory

        mixer.gates, mixer.scan = watched_gates, watched_scan
    return seen


def gradients_of(model: Any) -> dict[str, torch.Tensor]:
    """Every gradient there is; the model keeps none of them."""
    found = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def distance(found: dict[str, torch.Tensor], true: dict[str, torch.Tensor], part: str = "") -> float:
    """Relative RMS error of all gradients together whose name contains ``part``."""
    keys = [key for key in true if part in key]
    error = sum((found[key].float() - true[key].float()).square().sum().item() for key in keys)
    return (error / max(sum(true[key].float().square().sum().item() for key in keys), 1e-30)) ** 0.5


def measure(config: Any, mixer: str, tokens: int) -> dict[str, Any]:
    """All passes of one mixer."""
    model = build(config, mixer)
    one_pass(model, tokens)
    before_rounding = gradients_of(model)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.bfloat16())
    exact = one_pass(model, tokens)
    missing = [key for key, p in model.named_parameters() if p.grad is None]
    true = gradients_of(model)
    sensitivity = distance(before_rounding, true, "self_attention")
    del before_rounding
    model = in_bfloat16(model)
    seen = watch(model)
    if not cpu.needed():
        torch.cuda.reset_peak_memory_stats()
    half = one_pass(model, tokens)
    memory = None if cpu.needed() else torch.cuda.max_memory_allocated() / 2**30
    float32 = [
        key.split("self_attention.")[-1] for key, p in model.named_parameters() if p.dtype == torch.float32
    ]
    found = gradients_of(model)
    return {
        "mixer": mixer,
        "loss_float32": exact["loss"],
        "loss_bfloat16": half["loss"],
        "gradients_finite": not missing and all(bool(g.isfinite().all()) for g in found.values()),
        "without_gradient": missing,
        "gradient_error_mixers": distance(found, true, "self_attention"),
        "gradient_error_all": distance(found, true),
        "gradient_change_by_rounding_weights": sensitivity,
        "gates": sorted(seen["gates"]),
        "memory": sorted(seen["memory"]),
        "float32_parameters": sorted(set(float32)),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds_bfloat16": half["seconds"],
        "seconds_float32": exact["seconds"],
        "peak_gib_bfloat16": memory,
    }


def main() -> None:
    """Measure what the output does not hold yet."""
    options = given()
    sizes = {"layers": options.layers, "tokens": options.tokens}
    where = {"device": "CPU" if cpu.needed() else torch.cuda.get_device_name(), "torch": torch.__version__}
    results: list[dict[str, Any]] = []
    if options.output.exists():
        before = json.loads(options.output.read_text())
        results = before["results"] if before.items() >= (where | sizes).items() else []
    results = [result for result in results if "error" not in result]
    mixtures = ("mom_gla", "mom_gated_deltanet")
    mixers = options.mixers or [n for n in lsm.names() if not n.startswith("mom_") or n in mixtures]
    config = prepare(options.tokens, options.layers)
    for mixer in sorted(set(mixers) - {result["mixer"] for result in results}):
        try:
            results.append(measure(config, mixer, options.tokens))
        except Exception:
            results.append({"mixer": mixer, "error": traceback.format_exc()})
        gc.collect()
        if not cpu.needed():
            torch.cuda.empty_cache()
        print(json.dumps(results[-1]), flush=True)
        options.output.write_text(json.dumps(where | sizes | {"results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
