"""Run a command with its output logged and the lines that matter shown, its signals passed on, its exit code returned.

What `command 2>&1 | tee log` is for, without losing the exit code: this process reads the command's two streams,
writes every byte to the log, and the lines that `show` wants to its own streams. It stays until both streams end, so
that the last words of a crash are kept. Whoever still holds them a while after the command has ended is ended, too: a
worker that was killed (out of memory) in the middle of a save leaves Megatron's writers behind, which wait for ever.
The command gets a session of its own, so that a signal reaches it once, from here, and it is told to stop when this
process is killed.
"""

import ctypes
import os
import re
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_PR_SET_PDEATHSIG = 1
_GRACE = 10.0  # seconds that output may go on after the command has ended

# Megatron prints some 900 lines before the first step. A person wants the steps, evaluations, checkpoints, and us.
_OUR_LINES = re.compile(
    rb"step +\d|linear_moe\b(?!\S* FAILED)|.*/linear_moe/\S+\.py:\d+: \w*Warning"
    rb"|.*successfully (saved|loaded) checkpoint|.*validation loss at|.*exiting program at iteration"
)

# What a process says of a person's mistake: three lines behind the name of the exception, or argparse's one.
_MISTAKE = re.compile(r"^\w*Error: ((?:(?!\w*Error: ).*\n){1,40}?  why: .*\n  try: .*)", re.MULTILINE)
_EXCEPTION = re.compile(r"^[\w.]+(?:Error|Exception)\b(?!.*ChildFailedError)(?:: .*)?", re.MULTILINE)
_KILLED = re.compile(r"failed \(exitcode: -(\d+)\)")
_BAD_ARGUMENT = re.compile(r"^\S+\.py: error: (.*)", re.MULTILINE)
_RANK = re.compile(r"^\[rank\d+\]: ?", re.MULTILINE)
_SEARCHED_BYTES = 1 << 23
_LONGEST_CAUSE = 300  # some exceptions list every tensor

Show = Callable[[bytes], bool]


def is_our_line(line: bytes) -> bool:
    """Whether a line of a training run is for the person who waits for it, and not only for the log."""
    return _OUR_LINES.match(line) is not None


def run_logged(
    command: list[str],
    log: Path,
    environment: dict[str, str],
    show: Show = lambda line: True,
    received: list[signal.Signals] | None = None,
) -> int:
    """Run `command` and return its exit code, 128 + signal for one that a signal ended; `log` is appended to.

    Signals that arrive meanwhile are passed on, and added to `received`.
    """
    arrived = [] if received is None else received
    with log.open("ab", buffering=0) as log_file:
        child = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=_stop_with_parent,
        )
        previous = {
            number: signal.signal(number, lambda n, _: _send(child, n, arrived)) for number in _FORWARDED
        }
        try:
            assert child.stdout is not None and child.stderr is not None
            kept = _Log(log_file)
            targets = {child.stdout: _Lines(sys.stdout, show), child.stderr: _Lines(sys.stderr, show)}
            _copy(targets, kept, child)
            code = child.wait()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
    return code if code >= 0 else 128 - code


def mistake(log: Path) -> str | None:
    """What, why and what to type, of a run that a person's mistake ended; None when the log's end holds no such lines.

    Every rank says it inside a traceback, and torchrun adds its own below: the end of the log alone may not show it.
    """
    text = _end(log)
    if (found := _MISTAKE.search(text)) is not None:
        return found[1]
    if (found := _BAD_ARGUMENT.search(text)) is not None:
        return (
            f"{found[1]}\n  why: EXTRA_ARGS goes to the trainer as it is\n"
            f"  try: python -m linear_moe.training.pretrain --help, which lists all arguments"
        )
    return None


def cause(log: Path) -> str | None:
    """The first exception of a run that failed; below it stand those of all other ranks, and torchrun's own.

    A process that a signal ended had no last words: what the others say is that it is gone.
    """
    text = _end(log)
    if (ended := ended_by_signal(text)) is not None:
        return ended
    found = _EXCEPTION.search(text)
    return found[0][:_LONGEST_CAUSE] if found is not None else None


def ended_by_signal(text: str) -> str | None:
    """Of the text of a log: the signal that ended a process, if torchrun names one."""
    if (killed := _KILLED.search(text)) is None:
        return None
    name = signal.Signals(int(killed[1])).name
    return f"{name} ended a process{', most often for want of memory' if name == 'SIGKILL' else ''}"


def _end(log: Path) -> str:
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - _SEARCHED_BYTES))
        return _RANK.sub("", stream.read().decode(errors="replace"))


def last_lines(log: Path, count: int) -> str:
    """The end of a log, for the person whose run just failed."""
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - 400 * count))
        return "\n".join(stream.read().decode(errors="replace").splitlines()[-count:])


def _stop_with_parent() -> None:
    # Linux: SIGTERM for this process when its parent dies, even by SIGKILL; torchrun then stops its workers.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _send(child: subprocess.Popen, number: int, arrived: list[signal.Signals]) -> None:
    arrived.append(signal.Signals(number))
    if child.poll() is None:
        child.send_signal(number)


def _copy(streams: dict[IO[bytes], "_Lines"], log: "_Log", child: subprocess.Popen) -> None:
    ended = None
    with selectors.DefaultSelector() as selector:
        for source, target in streams.items():
            selector.register(source, selectors.EVENT_READ, target)
        while selector.get_map():
            for key, _ in selector.select(timeout=1.0):
                piece = os.read(key.fd, 1 << 16)
                log.write(piece)
                key.data.take(piece)
                if not piece:
                    selector.unregister(key.fileobj)
            if ended is None and child.poll() is not None:
                ended = time.monotonic()
            if ended is not None and time.monotonic() > ended + _GRACE:
                _end_holders([key.fd for key in selector.get_map().values()], log)


def _end_holders(pipes: list[int], log: "_Log") -> None:
    """Kill every process that may still write into these pipes."""
    names = {f"pipe:[{os.fstat(pipe).st_ino}]" for pipe in pipes}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if names & {os.readlink(file) for file in (entry / "fd").iterdir()}:
                os.kill(int(entry.name), signal.SIGKILL)
                log.write(f"linear_moe: process {entry.name} outlived the run and was killed\n".encode())
        except OSError:
            continue  # gone, or another person's


class _Log:
    """A file that may stop growing, on a full disk: the run goes on, and its person is told once."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.is_whole = file, True

    def write(self, piece: bytes) -> None:
        try:
            self.file.write(piece)
        except OSError as error:
            if self.is_whole:
                sys.stderr.write(
                    f"linear_moe: the log has a gap from here, {self.file.name}: {error.strerror}\n"
                )
            self.is_whole = False


class _Lines:
    """Writes the wanted lines of a stream of pieces; the empty piece ends the last line."""

    def __init__(self, target: Any, show: Show) -> None:
        self.target, self.show, self.rest = target.buffer, show, b""

    def take(self, piece: bytes) -> None:
        *lines, self.rest = (self.rest + piece).splitlines(keepends=True) or [b""]
        if self.rest.endswith(b"\n") or not piece:
            lines, self.rest = [*lines, self.rest], b""
        wanted = b"".join(line for line in lines if self.show(line))
        if not wanted:
            return
        try:
            self.target.write(wanted)
            self.target.flush()
        except BrokenPipeError:
            # Our reader is gone (`| head`): the run and its log go on, and what is buffered is flushed into nothing.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.target.fileno())
            os.close(nowhere)
