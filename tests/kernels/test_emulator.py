"""Fused kernels as compiled for a GPU, run on a CPU: right in bfloat16 and without races; and races are found."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

AROUND = {
    **{"rotate_heads": 1, "log_decay_of": 4, "bounded_decay_of": 1, "conv_and_split": 1},
    **{"lerp_tokens": 3, "edit_keys": 1, "gated_group_norm": 2},
    **{"rms_norm": 2, "skip_gate_norm": 3, "adam_": 1},
}
"""What stands around the recurrences, and how many kinds are looked at."""
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from emulator.machine import Machine  # noqa: E402
from emulator.memory import Global, IllegalAccess, Shared  # noqa: E402
from emulator.ptx import translate  # noqa: E402

EXCHANGE = """
.visible .entry exchange(
	.param .u64 .ptr .global .align 1 exchange_param_0
)
.reqntid 64
{
	ld.param.b64 	%rd1, [exchange_param_0];
	mov.u32 	%r1, %tid.x;
	shl.b32 	%r2, %r1, 2;
	mov.b32 	%r3, global_smem;
	add.s32 	%r4, %r3, %r2;
	st.shared.b32 	[%r4], %r1;
	BARRIER;
	xor.b32 	%r5, %r4, OTHER;
	ld.shared.b32 	%r6, [%r5];
	mul.wide.u32 	%rd2, %r1, 4;
	add.s64 	%rd3, %rd1, %rd2;
	st.global.b32 	[%rd3 + 0], %r6;
	ret;
}
"""


def exchanged(barrier: str, other: int, size: int = 256) -> tuple[list[int], set[str]]:
    """What every thread reads from the one whose number differs by ``other`` bytes / 4, and hazards."""
    out, hazards = torch.zeros(64, dtype=torch.int32), set[str]()
    program = translate(EXCHANGE.replace("BARRIER", barrier).replace("OTHER", str(other)))
    memory = Global([out[: size // 4].clone() if size < 256 else out], hazards)
    memory.begin()
    machine = Machine(program.num_threads, Shared(256, hazards), memory, (0, 0, 0), (1, 1, 1))
    program.run(machine, {"exchange_param_0": np.uint64(out.data_ptr())})
    return out.tolist(), hazards


@pytest.mark.parametrize(
    "barrier, other, is_race",
    [
        ("bar.sync 0", 128, False),
        ("bar.warp.sync -1", 4, False),
        ("bar.warp.sync -1", 128, True),
        ("", 4, True),
    ],
)
def test_a_missing_barrier_is_a_hazard(barrier: str, other: int, is_race: bool) -> None:
    found, hazards = exchanged(barrier, other)
    assert found == [n ^ other // 4 for n in range(64)]  # threads in lockstep do not show it
    assert bool(hazards) == is_race


def test_memory_of_no_tensor_is_refused() -> None:
    with pytest.raises(IllegalAccess, match="no tensor"):
        exchanged("bar.sync 0", 4, size=128)


def test_a_buffer_filled_while_a_product_reads_it_is_a_hazard() -> None:
    """What Triton made of the delta rule's gradients for Hopper, before they loaded the memories twice."""
    hazards = set[str]()
    shared, place, thread = Shared(1024, hazards), np.array([64], np.uint32), np.array([0])
    machine: Any = Machine(128, shared, Global([], hazards), (0, 0, 0), (1, 1, 1))
    shared.multiplies(np.array([16]), "product")
    machine._products.append(np.array([16]))
    machine.commit_products()
    machine.wait_for_products(1)
    shared.writes(place, 16, thread, "copy", is_copy=True)
    assert {hazard.split(":")[0] for hazard in hazards} == {
        "write after read of another thread without barrier",
        "write while an asynchronous product reads",
    }
    hazards.clear()
    machine.wait_for_products(0)
    shared.barrier += 1
    shared.writes(place, 16, thread, "copy", is_copy=True)
    assert not hazards


def test_results_of_hopper_in_bfloat16() -> None:
    """Asynchronous products and copies, and the gradients that had the race."""
    command = [sys.executable, str(ROOT / "benchmarks/emulate_check.py"), "--ops"]
    command += ["delta_rule", "diag_decay", *AROUND]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    options = "--kinds", "scalar", "--dims", "64x128", "--tokens", "70"
    run = subprocess.run([*command, *options], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("d log_decay") == 2
    assert all(run.stdout.count(f"\n{op} ") == num_kinds for op, num_kinds in AROUND.items())
