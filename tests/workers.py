"""One pool of gloo worker processes for the whole test session: importing Megatron in each test would cost seconds.

Workers are forks of a process that has imported ``tests/worker_imports.py``, which saves four seconds for each. A test
writes ``gloo(world_size, fn, *args)`` (the fixture of ``conftest.py``), with a module-level
``fn(rank, world_size, *args)``; it runs on the first `world_size` workers and the results come back by rank. The pool
grows to the largest world asked for. The workers keep their world (process group) from test to test and make a new one
when its size changes. Every worker is on the CPU platform, single-threaded, and talks over loopback.

``LINEAR_MOE_WORKERS=cuda`` gives each a GPU of its own, and NCCL: for ``tests/training/test_layouts.py`` and
``test_family_layouts.py``, whose functions leave all to Megatron. A world of more ranks than GPUs is skipped; every
task has a new one, since all ranks of a node have to leave a world of NCCL together.
"""

import contextlib
import datetime
import faulthandler
import gc
import os
import pickle
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import connection, forkserver, get_context, parent_process, set_start_method
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

LOG_TAIL = 3000  # characters of a worker's output shown with its error
STACK = "Current thread"  # how faulthandler begins the stack of the thread that was interrupted
GRACE = 5.0  # seconds that the other ranks get to finish after one has failed
ON_GPUS = os.environ.get("LINEAR_MOE_WORKERS") == "cuda"
PATIENCE = 500.0  # seconds for a task: a GPU may compile kernels first, and machines of CI are slow at times


class Pool:
    """Worker processes, started when a test first needs them."""

    def __init__(self) -> None:
        self.workers: list[tuple[Any, Connection, Path]] = []
        self.logs = Path(tempfile.mkdtemp(prefix="linear_moe_workers_"))
        self.world: tuple[int, int] | None = None  # (size, generation) that the workers are in

    def run(self, world_size: int, fn: Callable, *args: Any, timeout: float = PATIENCE) -> list[Any]:
        """``[fn(rank, world_size, *args) for rank in range(world_size)]``, each in its own process, as one world.

        Raises:
            TimeoutError: it took longer than `timeout` seconds; the pool was ended, with every worker's stack shown.
            Exception: the first one that a rank raised, with that rank's traceback as a note.
        """
        if ON_GPUS:
            _skip_without_gpus(world_size)
        task = pickle.dumps((fn, args))
        self._grow(world_size)
        if ON_GPUS or self.world is None or self.world[0] != world_size:
            generation = 0 if self.world is None else self.world[1] + 1
            self.world = (world_size, generation)
        message = (world_size, self.world, self.address, list(sys.path))
        outputs = [log.stat().st_size for _, _, log in self.workers]
        try:
            for rank in range(world_size):
                self.workers[rank][1].send((*message, task))
            replies = self._collect(world_size, time.monotonic() + timeout)
        except BaseException:  # the time-out of pytest, Ctrl-C: who knows where the workers are
            self.close()
            raise
        failed = [rank for rank, (ok, _, _) in sorted(replies.items(), key=lambda item: item[1][2]) if not ok]
        if failed or len(replies) < world_size:
            self._fail(world_size, replies, failed, outputs, timeout)
        return [pickle.loads(replies[rank][1]) for rank in range(world_size)]

    def _grow(self, size: int) -> None:
        """Have at least `size` workers."""
        import torch.distributed as dist

        if not self.workers:
            self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            self.address = ("127.0.0.1", self.store.port)
            self.world = None
        context = _fork_server()
        for rank in range(len(self.workers), size):
            ours, theirs = context.Pipe()
            log = self.logs / f"worker{rank}.log"
            log.touch()
            # Not a daemon: those may have no children, and Megatron saves checkpoints in one.
            process = context.Process(
                target=_work, args=(rank, theirs, log, _environment()), name=f"gloo worker {rank}"
            )
            process.start()
            theirs.close()
            self.workers.append((process, ours, log))

    def _collect(self, world_size: int, deadline: float) -> dict[int, tuple[bool, bytes, float]]:
        """Replies by rank: (did it return, pickled result or error, when); all of them unless the time is over."""
        replies: dict[int, tuple[bool, bytes, float]] = {}
        pipes = {self.workers[rank][1]: rank for rank in range(world_size)}
        while len(replies) < world_size and time.monotonic() < deadline:
            waiting = [pipe for pipe, rank in pipes.items() if rank not in replies]
            for pipe in connection.wait(waiting, timeout=max(0.0, deadline - time.monotonic())):
                try:
                    ok, value = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    ok, value = False, pickle.dumps((None, "the worker process died"))
                replies[pipes[pipe]] = (ok, value, time.monotonic())  # type: ignore[index]
                if not ok:
                    deadline = min(deadline, time.monotonic() + GRACE)
        return replies

    def _fail(
        self, world_size: int, replies: dict, failed: list[int], outputs: list[int], timeout: float
    ) -> None:
        """End a pool whose ranks are out of step, and raise what went wrong first."""
        stuck = [rank for rank in range(world_size) if rank not in replies]
        for rank in stuck:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.workers[rank][0].pid, signal.SIGUSR1)  # faulthandler writes its stack to its log
        time.sleep(0.3 if stuck else 0.0)
        printed = {
            rank: self.workers[rank][2].read_bytes()[outputs[rank] :].decode(errors="replace")
            for rank in range(world_size)
        }
        if ON_GPUS or stuck or any(not self.workers[rank][0].is_alive() for rank in range(world_size)):
            self.close()
        else:
            self.world = (0, self.world[1])  # a new world next time: this one may hold half a collective
        if not failed:
            stacks = "".join(
                f"\n--- rank {rank} of {world_size}:\n{_end_of(printed[rank])}" for rank in stuck
            )
            raise TimeoutError(f"ranks {stuck} took longer than {timeout} s{stacks}")
        rank = failed[0]
        error, text = pickle.loads(replies[rank][1])
        error = error if error is not None else RuntimeError(text.strip().splitlines()[-1])
        error.add_note(
            f"--- rank {rank} of {world_size} (failed: {failed}, stuck: {stuck}):\n{text}\n{_end_of(printed[rank])}"
        )
        raise error

    def close(self) -> None:
        """End every worker; the next ``run`` starts new ones."""
        for process, pipe, _ in self.workers:
            pipe.close()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
        for process, _, _ in self.workers:
            process.join()
        self.workers = []
        self.world = None
        self.store = None


def _end_of(output: str) -> str:
    """The last that a worker printed: of a stack its innermost frames, without those of modules that call modules."""
    start = output.rfind(STACK)
    if start < 0:
        return output[-LOG_TAIL:]
    frames = [line for line in output[start:].splitlines() if "torch/nn/modules/module.py" not in line]
    return output[max(0, start - LOG_TAIL // 2) : start] + "\n".join(frames)[:LOG_TAIL]


def _skip_without_gpus(world_size: int) -> None:
    import pytest
    import torch

    if world_size > (found := torch.cuda.device_count()):
        pytest.skip(f"needs {world_size} GPUs, here are {found}")


def _fork_server() -> Any:
    """A multiprocessing context whose processes start with the imports done; with GPUs each does its own.

    The imports choose between the CPU platform and GPUs, of which a process that forks must not have one.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload([] if ON_GPUS else ["tests.worker_imports"])
    path = os.pathsep.join(filter(None, sys.path))
    hidden = {} if ON_GPUS else {"CUDA_VISIBLE_DEVICES": ""}
    with patch.dict(os.environ, {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", **hidden}):
        forkserver.ensure_running()
    return context


def _environment() -> dict[str, str]:
    """What a worker inherits: not the variables that a model built in this process has left for the next."""
    return {name: value for name, value in os.environ.items() if not name.startswith("NVTE_")}


def _work(index: int, pipe: Connection, log: Path, environment: dict[str, str]) -> None:
    """A worker's life: take a task, join its world, run it, leave no Megatron state behind, reply."""
    os.environ.clear()  # the fork server's
    os.environ.update(environment)
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.setsid()  # a process group of its own, to end it whole
    set_start_method("fork", force=True)  # the default of an ordinary process, for data loaders
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ |= {"LOCAL_RANK": str(index), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"  # Megatron asks for it with TP or CP
    if not ON_GPUS:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported: also on a machine with a GPU
    import torch

    torch.set_num_threads(1)
    if ON_GPUS:
        torch.cuda.set_device(index)
        import tests.worker_imports  # noqa: F401
    else:
        from linear_moe.training import cpu

        cpu.activate()
    current = None
    while True:
        try:
            world_size, world, address, path, task = pipe.recv()
        except EOFError:  # the test session is over
            os.killpg(0, signal.SIGKILL)
        try:
            sys.path[:] = path
            if world != current:
                _join_world(index, world, address)
                current = world
            fn, args = pickle.loads(task)
            torch.manual_seed(0)
            reply = (True, pickle.dumps(fn(index, world_size, *args)))
        except BaseException as error:  # SystemExit too: Megatron calls sys.exit
            reply = (False, _pickled_error(error))
            if ON_GPUS:  # others may wait for this rank, which would wait for them: the pool is ended
                pipe.send(reply)
                signal.pause()
        try:
            leave_model_parallel()
            if ON_GPUS:
                torch.distributed.destroy_process_group()
        except Exception:
            traceback.print_exc()
        gc.collect()
        gc.freeze()  # what is left lives as long as the worker: Megatron collects garbage in every save
        pipe.send(reply)


def _end_with_parent() -> None:
    """End this process once the test session is gone, even from within a collective that never returns."""
    session = parent_process()
    assert session is not None
    session.join()
    os.killpg(0, signal.SIGKILL)  # with the process that Megatron keeps for its checkpoint queue


def _pickled_error(error: BaseException) -> bytes:
    """(the exception, or None where it cannot travel; its traceback)."""
    text = traceback.format_exc()
    if not isinstance(error, Exception):
        error = RuntimeError(f"{type(error).__name__}: {error}")
    try:
        pickle.loads(data := pickle.dumps((error, text)))
        return data
    except Exception:
        return pickle.dumps((None, text))


def _join_world(rank: int, world: tuple[int, int], address: tuple[str, int]) -> None:
    """Make `world` the default process group of this worker."""
    import torch.distributed as dist

    size, generation = world
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    if dist.is_initialized():
        dist.destroy_process_group()
    store = dist.TCPStore(*address, is_master=False, wait_for_workers=False)
    dist.init_process_group(
        "nccl" if ON_GPUS else "gloo",
        store=dist.PrefixStore(f"world {generation}", store),
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(minutes=5),
    )


@contextlib.contextmanager
def with_model_parallel(
    tp: int = 1,
    pp: int = 1,
    vpp: int | None = None,
    cp: int = 1,
    ep: int = 1,
    etp: int | None = None,
    seed: int = 1234,
    gloo_groups: bool = False,
) -> Iterator[None]:
    """Inside a worker: Megatron's process groups for a layout of the current world, and its RNG tracker, seeded.

    ``etp`` is Megatron's default (= tp) when None. With ``gloo_groups`` the second set of data-parallel groups exists
    that the distributed optimizer takes unless it is told otherwise. Afterwards nothing is left.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        context_parallel_size=cp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
        create_gloo_process_groups=gloo_groups,
    )
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    try:
        yield
    finally:
        leave_model_parallel()


def leave_model_parallel() -> None:
    """Drop every process group but the world, and the global state of Megatron, whatever of it there is."""
    import torch.distributed as dist

    modules = {
        "megatron.core.num_microbatches_calculator": "unset_num_microbatches_calculator",
        "megatron.core.rerun_state_machine": "destroy_rerun_state_machine",
        "megatron.core.transformer.moe.moe_logging": "destroy_moe_metrics_tracker",
        "megatron.training.global_vars": "unset_global_variables",
        "megatron.core.parallel_state": "destroy_model_parallel",
    }
    for module, function in modules.items():
        if module in sys.modules:
            getattr(sys.modules[module], function)()
    random = sys.modules.get("megatron.core.tensor_parallel.random")
    if random is not None:
        random._CUDA_RNG_STATE_TRACKER = None
        random._CUDA_RNG_STATE_TRACKER_INITIALIZED = False
    moe = sys.modules.get("megatron.core.transformer.moe.moe_utils")
    if moe is not None:
        moe.MoEAuxLossAutoScaler.main_loss_backward_scale = None  # else copied into, whatever its shape was
    training = sys.modules.get("megatron.training.training")
    if (
        training is not None
    ):  # times of a pretrain() in an earlier, smaller world: ranks would disagree on having them
        training._STARTUP_TIMESTAMPS.update(dict.fromkeys(training._STARTUP_TIMESTAMPS))
        training._seqlen_stats_active = (
            False  # a packed micro-batch that no step consumed: a collective on some ranks only
        )
    _free_models()
    if dist.is_initialized():
        for group in list(dist.distributed_c10d._world.pg_map):
            if group is not dist.group.WORLD:
                dist.destroy_process_group(group)


def _free_models() -> None:
    """Let go of what training has built, and with it of its process groups, each of which has threads.

    A wrapped model holds its gradients' accumulators, themselves, by the views of weights that a distributed optimizer
    has, and by the graph of the last tokens that experts' dispatchers and RWKV7 keep; and they hold the hooks that hold
    it: cycles through C++ that no garbage collector sees. The log of training holds layers, too.
    """
    module = sys.modules.get("megatron.core.distributed.distributed_data_parallel")
    if module is None:
        return
    alive = gc.get_objects()
    for found in [x for x in alive if type(x) is module.DistributedDataParallel]:
        found.grad_accs.clear()
        for part in found.modules():
            dispatcher = getattr(part, "token_dispatcher", None)
            if dispatcher is not None:
                dispatcher.probs = None
            if hasattr(part, "first_value"):
                part.first_value.x_BTHV = None
    optimizer = sys.modules["megatron.core.optimizer.distrib_optimizer"].DistributedOptimizer
    for found in [x for x in alive if type(x) is optimizer]:
        vars(found).clear()
    engine = sys.modules.get("linear_moe.training.engine")
    training = sys.modules.get("megatron.training.training")
    if engine is not None and training is not None:
        for name in ("training_log", "evaluate_and_print_results", "evaluate"):
            setattr(training, name, engine.stock(training, name))


def free_port() -> int:
    """A loopback port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
