"""Run a command with its output shown and logged, its signals passed on, and its exit code returned.

What `command 2>&1 | tee log` is for, without losing the exit code: this process reads the command's two streams and
writes each piece to its own stream and to the log. It stays until both streams end, so that the last words of a crash
are kept.
The command gets a session of its own, so that a signal reaches it once, from here, and it is told to stop when this
process is killed.
"""

import ctypes
import os
import selectors
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO, BinaryIO

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_PR_SET_PDEATHSIG = 1


def run_logged(command: list[str], log: Path, environment: dict[str, str]) -> int:
    """Run `command` and return its exit code, 128 + signal for one that a signal ended; `log` is appended to."""
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
        previous = {number: signal.signal(number, lambda n, _: _send(child, n)) for number in _FORWARDED}
        try:
            assert child.stdout is not None and child.stderr is not None
            _copy({child.stdout: sys.stdout.buffer, child.stderr: sys.stderr.buffer}, log_file)
            code = child.wait()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
    return code if code >= 0 else 128 - code


def _stop_with_parent() -> None:
    # Linux: SIGTERM for this process when its parent dies, even by SIGKILL; torchrun then stops its workers.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _send(child: subprocess.Popen, number: int) -> None:
    if child.poll() is None:
        child.send_signal(number)


def _copy(streams: dict[IO[bytes], BinaryIO], log_file: IO[bytes]) -> None:
    with selectors.DefaultSelector() as selector:
        for source, target in streams.items():
            selector.register(source, selectors.EVENT_READ, target)
        while selector.get_map():
            for key, _ in selector.select():
                piece = os.read(key.fd, 1 << 16)
                if not piece:
                    selector.unregister(key.fileobj)
                    continue
                log_file.write(piece)
                try:
                    key.data.write(piece)
                    key.data.flush()
                except BrokenPipeError:
                    # The reader of our output is gone (`| head`); the run and its log go on.
                    selector.modify(key.fileobj, selectors.EVENT_READ, _Nowhere())


class _Nowhere:
    """A stream that forgets what is written to it."""

    def write(self, piece: bytes) -> None:
        """Forget the bytes."""

    def flush(self) -> None:
        """Nothing to do."""
