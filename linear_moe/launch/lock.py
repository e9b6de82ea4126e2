"""One launcher at a time in the folder of a run: two would write the same checkpoints and metrics."""

import fcntl
from collections.abc import Callable
from typing import IO

from linear_moe.launch.errors import PreflightError
from linear_moe.launch.plan import RunPlan


def hold_run(plan: RunPlan, announce: Callable[[str], None]) -> IO[str]:
    """A lock on the run, for this node's launcher, until the file is closed or the process ends, in whatever way.

    The folder is there. A file system without locks gives none, which is announced. Raises PreflightError where another
    holds it.
    """
    path = plan.run_dir / f".node{plan.settings.node_rank}.lock"
    file = path.open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise PreflightError(
            f"run {plan.run_dir} is being trained right now.",
            f"another process holds {path}; both would write the same checkpoints and metrics.",
            "another RUN_NAME, or wait until that one has ended"
            + (", or another NODE_RANK on this node" if plan.settings.nnodes > 1 else ""),
        ) from None
    except OSError as error:
        announce(
            f"{plan.run_dir} is on a file system without locks ({error.strerror}): nothing keeps a second launcher "
            f"from this run, and both would write the same checkpoints and metrics."
        )
    return file
