"""Checks of a real start, on its own machine: the address of node 0 has a meaning here, its port is free there."""

import errno
import socket

from linear_moe.launch.errors import PreflightError
from linear_moe.launch.megatron_args import DEFAULT_PORT
from linear_moe.launch.plan import RunPlan


def check_network(plan: RunPlan) -> None:
    """torchrun would wait for an unknown host without a word, and end with a traceback where the port is taken."""
    s = plan.settings
    if s.nnodes > 1 and s.master_addr is not None:
        try:
            socket.getaddrinfo(s.master_addr, None)
        except OSError as error:
            raise PreflightError(
                f"MASTER_ADDR={s.master_addr} is no host that this node knows ({error.strerror}).",
                "all nodes meet at the address of node 0.",
                "MASTER_ADDR=<IP address of node 0>, as `hostname -I` shows it there",
            ) from None
    port = s.master_port or (DEFAULT_PORT if s.nnodes > 1 else None)
    if port is None or s.node_rank > 0:
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            raise PreflightError(
                f"MASTER_PORT={port} {'is taken on this node' if taken else f'cannot be used: {error.strerror}'}.",
                "the processes of a run meet there, and another program listens."
                if taken
                else "the processes of a run meet there; ports below 1024 are the system's.",
                f"MASTER_PORT={port + 1 if port >= 1024 else DEFAULT_PORT}"
                + (", the same on every node" if s.nnodes > 1 else ", or none: any free one"),
            ) from None
