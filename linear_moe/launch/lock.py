"""One launcher at a time in the folder of a run: two would write the same checkpoints and metrics."""

import fcntl
from typing import IO

from linear_moe.launch.errors import PreflightError
from linear_moe.launch.plan import RunPlan


def hold_run(plan: RunPlan) -> IO[str]:
    """A lock on the run, for this node's launcher, until the file is closed or the process ends, in whatever way.

    The folder is there. A file system without locks gives none. Raises PreflightError where another holds it.
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
    except OSError:
        pass
    return file
