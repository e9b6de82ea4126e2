"""Two processes: what needs no memory runs while the all-gather of segments is on its way, backward as well.

A rank that takes part late shows it: the other one must get on with its work before it has heard from it.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch.distributed as dist

from tests.contract import layers
from tests.contract.cases import assert_close
from tests.contract.layers import Layout
from tests.contract.test_contract_layer import whole

START, BEGIN, ARRIVE = "the all-gather starts", "an operation begins", "the all-gather is waited for"
SEND, GRADIENTS, RECEIVE = (
    "the reduce-scatter starts",
    "gradients of an operation's tokens",
    "the reduce-scatter is waited for",
)
ONE_SCAN = [START, BEGIN, ARRIVE, SEND, GRADIENTS, RECEIVE]
FORWARD = [START, BEGIN, ARRIVE]
MIXERS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "gla": ({}, ONE_SCAN),
    "gated_deltanet": ({"values_per_key": 2, "expand_v": 2.0}, ONE_SCAN),
    "rwkv7": ({}, ONE_SCAN),
    "gsa": (
        {},
        [START, BEGIN, ARRIVE, BEGIN, GRADIENTS, SEND, GRADIENTS, RECEIVE],
    ),  # its second scan has its memory
    "mom_deltanet": ({"conv_size": 0}, ONE_SCAN),
}
CASES = [
    ("gla", True, False),
    ("gated_deltanet", False, False),
    ("gated_deltanet", True, True),
    ("rwkv7", True, False),
    ("gsa", False, False),
    ("mom_deltanet", True, False),
]
LIMIT = datetime.timedelta(seconds=20)


@contextmanager
def recorded(rank: int, name: str) -> Iterator[list[str]]:
    """What happens on this rank, in its order. Rank 1 takes part in a collective after rank 0 has done its own work."""
    from linear_moe.kernels import recompute_scan
    from linear_moe.parallel import collectives, lasp2

    events: list[str] = []
    ours: list[Any] = []
    store = dist.PrefixStore(f"overlap {name}", dist.distributed_c10d._get_default_store())

    def follow(function: Callable[..., Any], event: str, waits: str = "", tells: bool = False) -> Any:
        def follower(*args: Any, **kwargs: Any) -> Any:
            context = getattr(args[0], "gathering", None) if args else None
            if context is not None and not any(context is x for x in ours):
                return function(*args, **kwargs)  # another collective
            if waits and rank == 1:
                store.wait([waits], LIMIT)
            events.append(event)
            result = function(*args, **kwargs)
            if tells:
                store.set(event, "done")
            return result

        return follower

    def start(*args: Any) -> Any:
        ours.append(lasp2_start(*args))
        wait = ours[-1].wait
        ours[-1].wait = follow(wait, ARRIVE)
        return ours[-1]

    lasp2_start = follow(lasp2.start_all_gather, START, waits=BEGIN)
    begin = follow(recompute_scan.Scan.start, BEGIN, tells=True)
    leave = follow(recompute_scan.leave, GRADIENTS, tells=True)
    send = follow(collectives._Finish.backward, SEND, waits=GRADIENTS)
    receive = follow(collectives._Start.backward, RECEIVE)
    with (
        patch.object(lasp2, "start_all_gather", start),
        patch.object(recompute_scan.Scan, "start", begin),
        patch.object(recompute_scan, "leave", leave),
        patch.object(collectives._Finish, "backward", staticmethod(send)),
        patch.object(collectives._Start, "backward", staticmethod(receive)),
    ):
        yield events


def run(rank: int, world: int, name: str, options: dict[str, Any], layout: Layout, recomputes: bool) -> Any:
    """This rank's pieces of outputs and gradients, and what happened."""
    build = partial(layers.build, lsm_recompute=recomputes)
    with recorded(rank, f"{name} {layout}") as events, patch.object(layers, "build", build):
        pieces = layers.run_with(rank, world, name, options, layout)
    assert not isinstance(pieces, str), pieces
    return pieces, events


@pytest.mark.parametrize("name, packed, recomputes", CASES)
def test_the_collectives_hide_behind_work(gloo: Callable, name: str, packed: bool, recomputes: bool) -> None:
    options, expected = MIXERS[name]
    layout = Layout(2, cp=2, packed=packed)
    replies = gloo(2, run, name, options, layout, recomputes)
    for _, events in replies:
        assert events == (FORWARD if recomputes else []) + expected
    (single, nothing), *_ = gloo(1, run, name, options, Layout(1, packed=packed), False)
    assert START not in nothing
    assert_close(whole([pieces for pieces, _ in replies], layout), whole([single], Layout(1, packed=packed)))
