"""The run's output and its end: what is shown and kept, signals, a full disk, what is told of a failure."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from linear_moe.launch import __main__ as launcher
from linear_moe.launch import relay
from linear_moe.launch.relay import cause, is_our_line, last_lines, mistake, run_logged
from tests.launch.plans import make_plan

REPOSITORY = Path(__file__).parents[2]


def python(text: str) -> list[str]:
    return [sys.executable, "-u", "-c", textwrap.dedent(text)]


def test_exit_code_log_and_shown_lines(tmp_path: Path, capfdbinary: pytest.CaptureFixture):
    program = """
        import sys
        print("step 1/2 loss 3")
        print("noise")
        print("linear_moe: a warning", file=sys.stderr)
        sys.stdout.write("no newline at the end")
        sys.exit(7)
    """
    code = run_logged(python(program), tmp_path / "log", dict(os.environ), is_our_line)
    out, err = capfdbinary.readouterr()
    assert (code, out, err) == (7, b"step 1/2 loss 3\n", b"linear_moe: a warning\n")
    log = (tmp_path / "log").read_text()
    assert sorted(log.replace("linear_moe: a warning\n", "").splitlines()) == sorted(
        ["step 1/2 loss 3", "noise", "no newline at the end"]
    )
    assert "linear_moe: a warning\n" in log


def test_everything_can_be_shown(tmp_path: Path, capfdbinary: pytest.CaptureFixture):
    text = "x" * 200_000  # more than a pipe holds
    code = run_logged(
        python(f"print('a\\n' + 'x' * {len(text)}, end='')"), tmp_path / "log", dict(os.environ)
    )
    assert code == 0
    assert capfdbinary.readouterr().out.decode() == f"a\n{text}" == (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("step    20/700    2.9%  loss 6.4", True),
        ("linear_moe: GPU kernels are off", True),
        ("/x/linear_moe/kernels/dispatch.py:3: UserWarning: slow", True),
        ("  [2026-01-01 00:00:00] successfully saved checkpoint from iteration 3 to x", True),
        (" validation loss at iteration 3 on validation set | lm loss value: 6.9", True),
        ("/x/megatron/core/optimizer/__init__.py:25: UserWarning: Transformer Engine", False),
        ("  num_layers ...................... 4", False),
        ("stepping stones", False),
        ("linear_moe.training.pretrain FAILED", False),
    ],
)
def test_lines_for_people(line: str, shown: bool):
    assert is_our_line(line.encode() + b"\n") == shown


def test_the_run_has_the_environment_that_is_given(tmp_path: Path, capfdbinary: pytest.CaptureFixture):
    """And no input: a question would wait for ever, behind the log."""
    program = "import os, sys; print(sorted(os.environ)); print(repr(sys.stdin.read()))"
    assert run_logged(python(program), tmp_path / "log", {"MINE": "1"}) == 0
    names, read, *_ = capfdbinary.readouterr().out.decode().splitlines()
    assert "'MINE'" in names and "'PATH'" not in names and read == "''"


def test_a_signal_is_passed_on_and_remembered(tmp_path: Path):
    """To the launcher alone here, as from a scheduler; what handled it before does so again afterwards."""
    before, received = signal.getsignal(signal.SIGTERM), []
    program = "import os, signal, time; os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)"
    assert run_logged(python(program), tmp_path / "log", dict(os.environ), received=received) == 128 + 15
    assert received == [signal.SIGTERM] and signal.getsignal(signal.SIGTERM) is before


def test_bytes_that_are_no_text_are_searched_and_shown(tmp_path: Path):
    log = tmp_path / "log"
    log.write_bytes(b"\xff\nValueError: what\n  why: x\n  try: y\n\xfe\n")
    assert mistake(log) == "what\n  why: x\n  try: y" and cause(log) == "ValueError: what"
    assert last_lines(log, 1) == "\ufffd"


def test_last_lines(tmp_path: Path):
    (tmp_path / "log").write_text("".join(f"line {i}\n" for i in range(1000)))
    assert last_lines(tmp_path / "log", 3) == "line 997\nline 998\nline 999"


THREE_LINES = "conv_size is -1\n  why: it counts tokens\n  try: 4, or 0 for none"
TRACEBACK = "Traceback (most recent call last):\n  File 'x.py', line 3\n    f()\n"


@pytest.mark.parametrize(
    ("log", "told"),
    [
        (f"{TRACEBACK}ValueError: {THREE_LINES}\n{TRACEBACK}x.ChildFailedError: \n====\n", THREE_LINES),
        (f"KeyError: 3\n{TRACEBACK}ValueError: {THREE_LINES}\n", THREE_LINES),
        ("".join(f"[rank1]: {line}\n" for line in f"{TRACEBACK}ValueError: {THREE_LINES}".split("\n")), THREE_LINES),
        (f"ValueError: of\n    a\n    b\n  why: w\n  try: t\n{TRACEBACK}", "of\n    a\n    b\n  why: w\n  try: t"),
        (f"{TRACEBACK}ValueError: of somebody else\n{TRACEBACK}x.ChildFailedError: \n", None),
        ("step 1/2\n", None),
    ],
)  # fmt: skip
def test_a_mistake_is_found_among_tracebacks(tmp_path: Path, log: str, told: str | None):
    (tmp_path / "log").write_text("many lines\n" * 1000 + log)
    assert mistake(tmp_path / "log") == told


def test_the_first_exception_is_told(tmp_path: Path):
    rest = "[rank1]: KeyError: 2\ntorch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n"
    (tmp_path / "log").write_text(
        f"no Error: here\n[rank0]: {TRACEBACK}[rank0]: x.Error: {'y' * 999}\n{rest}"
    )
    assert cause(tmp_path / "log") == f"x.Error: {'y' * 999}"[:300]
    (tmp_path / "log").write_text(
        f"{rest}E1 api.py:986] failed (exitcode: -9) local_rank: 1 (pid: 3) of binary: p\n"
    )
    assert cause(tmp_path / "log") == "SIGKILL ended a process, most often for want of memory"
    (tmp_path / "log").write_text("failed (exitcode: -11) local_rank: 0\n")
    assert cause(tmp_path / "log") == "SIGSEGV ended a process"
    (tmp_path / "log").write_text("step 1/2\n")
    assert cause(tmp_path / "log") is None


def test_an_unknown_argument_is_told(tmp_path: Path):
    (tmp_path / "log").write_text(f"usage: pretrain.py [-h]\npretrain.py: error: no --x\n{TRACEBACK}")
    assert str(mistake(tmp_path / "log")).splitlines()[0] == "no --x"


def relay_command(program: str, log: Path) -> list[str]:
    """A process of its own that runs `program` through the relay."""
    code = (
        "import os, sys; from pathlib import Path; from linear_moe.launch.relay import run_logged; "
        "heard = []; "
        f"code = run_logged([sys.executable, '-u', '-c', {program!r}], Path({str(log)!r}), dict(os.environ), "
        "lambda line: True, heard); sys.exit(code if not heard or code == 128 + heard[0] else str(heard))"
    )
    return [sys.executable, "-c", code]


def start_relay(tmp_path: Path) -> tuple[subprocess.Popen, int]:
    """A relay in a process of its own, around a program that waits; and that program's pid."""
    program = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    command = relay_command(program, tmp_path / "log")
    relay = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    assert relay.stdout is not None
    return relay, int(relay.stdout.readline())


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 128 + 15), (signal.SIGUSR1, 128 + 10)])
def test_signals_reach_the_run_and_its_end_is_reported(tmp_path: Path, number: int, code: int):
    relay, child = start_relay(tmp_path)
    relay.send_signal(number)
    assert relay.wait(20) == code
    assert not is_alive(child)


def test_a_run_that_was_stopped_has_no_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "log").write_text(TRACEBACK + "RuntimeError: connection closed by peer\n")
    plan = make_plan(OUTPUT_BASEPATH=str(tmp_path), RUN_NAME="mine")
    launcher._report_failure(plan, tmp_path / "log", 1, [signal.SIGINT])
    assert capsys.readouterr().err.splitlines() == [
        "linear_moe: stopped by SIGINT: no checkpoint yet.",
        f"linear_moe: the run ended with exit code 1; all of its output is in {tmp_path}/log",
    ]
    plan.run_dir.mkdir()
    launcher._report_failure(plan, tmp_path / "log", 1, [])
    assert capsys.readouterr().err.splitlines()[-2] == "linear_moe: RuntimeError: connection closed by peer"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    launcher._report_failure(plan, tmp_path / "log", 1, [])
    assert capsys.readouterr().err.startswith(f"linear_moe: the disk of {tmp_path}/mine is full.\n  why: ")


def test_a_process_that_outlives_the_run_does_not_hold_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As the checkpoint writers of a worker that was killed: in a session of their own, with its output open."""
    monkeypatch.setattr(relay, "_GRACE", 0.3)
    program = """
        import subprocess, sys
        print(subprocess.Popen(["sleep", "60"], start_new_session=True).pid, flush=True)
        sys.exit(9)
    """
    started = time.monotonic()
    assert run_logged(python(program), tmp_path / "log", dict(os.environ)) == 9
    assert time.monotonic() - started < 20
    pid, told = (tmp_path / "log").read_text().splitlines()
    assert told == f"linear_moe: process {pid} outlived the run and was killed" and not is_alive(int(pid))


def test_a_full_disk_ends_the_log_and_not_the_run(capfd: pytest.CaptureFixture):
    program = "for i in range(3): print('step', i, flush=True)"
    assert run_logged(python(program), Path("/dev/full"), dict(os.environ)) == 0
    out, err = capfd.readouterr()
    assert out.splitlines() == ["step 0", "step 1", "step 2"]
    assert err == "linear_moe: the log has a gap from here, /dev/full: No space left on device\n"


def test_a_killed_launcher_takes_the_run_along(tmp_path: Path):
    relay, child = start_relay(tmp_path)
    relay.kill()
    relay.wait(20)
    deadline = time.monotonic() + 20
    while is_alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(child)


def test_a_reader_that_leaves_does_not_stop_the_run(tmp_path: Path):
    program = "import time\nfor i in range(2000): print('step', i)\ntime.sleep(0.2)\nprint('done')"
    relay = subprocess.Popen(relay_command(program, tmp_path / "log"), cwd=REPOSITORY, stdout=subprocess.PIPE)
    assert relay.stdout is not None
    relay.stdout.readline()
    relay.stdout.close()
    assert relay.wait(30) == 0
    assert (tmp_path / "log").read_text().endswith("done\n")
