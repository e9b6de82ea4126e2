# Sourced (.) by the scripts that start Python, which say where the repository is:
#
#   repository=<absolute path>; . "$repository/scripts/python.sh"
#
# PYTHON is the interpreter: the person's, else that of the repository's own environment; it finds this package.
python_other="PYTHON=<interpreter with megatron-core and torch>"
if [ -z "${PYTHON:-}" ]; then
    PYTHON=$repository/.venv/bin/python
    python_why="the environment of this repository has not been made yet."
    python_try="make -C $repository setup, or $python_other"
else
    python_why="PYTHON says that it is the interpreter."
    python_try="no PYTHON, for the one of: make -C $repository setup; or $python_other"
fi
if ! command -v "$PYTHON" >/dev/null; then
    printf 'linear_moe: there is no %s.\n  why: %s\n  try: %s\n' "$PYTHON" "$python_why" "$python_try" >&2
    exit 2
fi
if ! python_lacks=$("$PYTHON" -c '
import sys
if sys.version_info < (3, 12):
    sys.exit("it is Python %d.%d, and 3.12 or newer is needed" % sys.version_info[:2])
from importlib.util import find_spec
lacks = [name for name in ("numpy", "torch", "megatron") if find_spec(name) is None]
sys.exit("it lacks " + ", ".join(lacks) if lacks else 0)' 2>&1); then
    printf 'linear_moe: %s cannot run this.\n  why: %s.\n  try: %s\n' "$PYTHON" "$python_lacks" "$python_try" >&2
    exit 2
fi
export PYTHONPATH="$repository${PYTHONPATH:+:$PYTHONPATH}"
