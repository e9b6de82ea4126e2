"""Shared by all tests: the ``gloo`` fixture, the ``gpu`` mark, and thread counts that suit several processes."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")  # before torch is imported
sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest
import torch

from tests.workers import Pool

HIDING = str(Path(__file__).with_name("without_fla"))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [HIDING, os.environ.get("PYTHONPATH")]))

LONG = {
    "test_layouts.py": 9,
    "test_resume.py": 8,
    "test_contract_layer.py": 7,
    "test_contract_cp.py": 6,
    "test_family_layouts.py": 5,
    "test_matrix.py": 5,
    "test_end_to_end.py": 4,
    "test_whole_path.py": 4,
}
"""Test files that take longest, the longest first."""


def _take_turns_on_gpus() -> None:
    """Each process of xdist sees one GPU, the next process the next."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count())))).split(
        ","
    )
    if worker.isdigit() and len(seen) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = seen[int(worker) % len(seen)]


_take_turns_on_gpus()


@pytest.fixture(scope="session")
def _pool() -> Iterator[Pool]:
    pool = Pool()
    yield pool
    pool.close()


@pytest.fixture
def gloo(_pool: Pool) -> Callable:
    """``gloo(world_size, fn, *args, timeout=500)``: see ``tests/workers.py``."""
    return _pool.run


@pytest.fixture(autouse=True)
def _no_backend_left() -> Iterator[None]:
    """Megatron pins the first model's attention backend in the environment, for all later models and subprocesses."""
    yield
    for name in [name for name in os.environ if name.startswith("NVTE_")]:
        del os.environ[name]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a CUDA device where there is none; long files first, so that none is left alone at the end."""
    items.sort(key=lambda item: -LONG.get(item.path.name, 0))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
