"""The model of predict_kernels.py on flash-linear-attention, whose times on an H100 are known: how far off is it?

Its autotuner, which times on a GPU, is replaced: of at most ``--tries`` configurations of each kernel, spread over its
list, the one of the lowest estimate counts. Measured times are those of issue 4 (forward; with backward, 2k tokens).

    PYTHONPATH=. python benchmarks/predict_peer.py [--families gla ...] [--tries 3]

A family takes half a minute to two.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from typing import Any
from unittest import mock

os.environ["FLA_CACHE_RESULTS"] = "0"

import compile_check
import torch
import triton
from predict_kernels import Launch, Prediction, blank, passes, predict, show
from triton.runtime.autotuner import Autotuner

MEASURED = {
    "linear": "0.25-0.50; 1.75-1.92",
    "mamba2": "0.31; 1.89",
    "gla": "0.82; 3.48",
    "delta_net": "0.84; 2.92",
    "gated_delta_net": "0.90; 3.27",
    "kda": "1.07; 5.43",
}
"""Milliseconds."""


class _Properties:
    def get_device_properties(self, device: int) -> dict[str, int]:
        """What it asks of the device when it is imported."""
        return {"max_shared_mem": 232448, "multiprocessor_count": 132}


class _Driver(compile_check._Driver):
    utils = _Properties()

    def get_active_torch_device(self) -> torch.device:
        """Of the tensors."""
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        """Nothing of it is used."""
        return torch.cuda


@dataclasses.dataclass
class _Tuner:
    """Instead of ``Autotuner.run``."""

    tries: int
    chosen: dict[Any, Any] = dataclasses.field(default_factory=dict)

    def run(self, tuner: Autotuner, found: list[Launch], *args: Any, **kwargs: Any) -> None:
        """Leave the launch of the best configuration in ``found``."""
        tuner.nargs = dict(zip(tuner.arg_names, args))
        plain = {n: str(x) for n, x in kwargs.items() if not torch.is_tensor(x) and not callable(x)}
        key = id(tuner), tuple(sorted(plain.items()))
        all_of_them = self.chosen.get(key) or tuner.prune_configs(kwargs)
        count = min(self.tries, len(all_of_them))
        places = {round(n * (len(all_of_them) - 1) / max(1, count - 1)) for n in range(count)}
        best: tuple[float, list[Launch], Any] | None = None
        for config in (all_of_them[n] for n in sorted(places)):
            start = len(found)
            try:
                tuner.fn.run(*args, **kwargs, **config.all_kwargs())
                time = sum(predict(x).estimate for x in found[start:]) if count > 1 else 0.0
            except (ZeroDivisionError, triton.runtime.errors.OutOfResources):  # too much shared memory
                del found[start:]
                continue
            if best is None or time < best[0]:
                best = time, found[start:], config
            del found[start:]
        assert best is not None
        found += best[1]
        self.chosen[key], tuner.nargs = [best[2]], None


def peer_of(name: str, tries: int) -> list[Prediction]:
    """Of one family, at 2k tokens."""
    from linear_moe.bench.kernels import calls, peer

    family, shape = calls.FAMILIES[name], calls.SHAPES["2k"]
    peer.let_it_run(family)
    tuner = _Tuner(tries)
    run = lambda self, *args, **kwargs: tuner.run(self, found, *args, **kwargs)  # noqa: E731
    found: list[Launch] = []
    with mock.patch.object(Autotuner, "run", run):
        passes(peer.peer(family, shape), peer.arguments(blank(family, shape)), found)
    return [predict(x) for x in found]


def main() -> int:
    """Every family asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--families", nargs="+", choices=list(MEASURED), default=list(MEASURED))
    parser.add_argument("--tries", type=int, default=3)
    asked = parser.parse_args()
    for name in ("get_device_name", "get_device_capability", "device_count"):
        answer = {"get_device_name": "NVIDIA H100", "get_device_capability": (9, 0), "device_count": 1}[name]
        setattr(torch.cuda, name, lambda *args, answer=answer: answer)
    triton.runtime.driver.set_active(_Driver(90))
    for family in asked.families:
        show(f"{family}, measured {MEASURED[family]} ms", peer_of(family, asked.tries), None, None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
