#!/bin/sh
# Make the environment of this repository in .venv: Python 3.12, the pinned requirements, this package (editable).
# Does nothing when it is up to date. Two at once are safe: the second waits. PYTHON=<interpreter> chooses the Python.
set -eu
case ${1:-} in
    '') ;;
    -h | --help) echo 'sh scripts/setup.sh' && exec sed -n '2,3s/^# /    /p' "$0" ;;
    *)
        printf 'linear_moe: %s takes no %s.\n  why: the environment is always the same one.\n' "$0" "$1" >&2
        printf '  try: sh scripts/setup.sh, or PYTHON=<interpreter> sh scripts/setup.sh\n' >&2
        exit 2
        ;;
esac
cd -- "$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)"

usable() { # Python 3.12 that runs and can make environments
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] != (3, 12))' >/dev/null 2>&1
}

find_python() {
    for candidate in "${PYTHON:-}" python3.12 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python3.12 \
        /opt/python/3.12*/bin/python3.12 /usr/local/bin/python3.12 python3 python; do
        if [ -n "$candidate" ] && usable "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    if command -v uv >/dev/null; then
        uv python find 3.12 2>/dev/null || { uv python install 3.12 >&2 && uv python find 3.12; }
        return
    fi
    echo "linear_moe: no Python 3.12 found." >&2
    echo "  why: Megatron-Core 0.19 needs 3.12 or newer, and the pinned versions were tested with 3.12." >&2
    echo "  try: PYTHON=/path/to/python3.12 make setup, or install it (apt-get install python3.12-venv," >&2
    echo "       pyenv install 3.12, conda create -n py312 python=3.12, or uv, which fetches one itself)" >&2
    return 1
}

if [ -n "${PYTHON:-}" ] && ! usable "$PYTHON"; then
    echo "linear_moe: PYTHON=$PYTHON is not a working Python 3.12." >&2
    echo "  why: it does not start, has another version, or lacks the venv module." >&2
    echo "  try: another PYTHON, or none, to look for one" >&2
    exit 2
fi

if command -v flock >/dev/null; then
    exec 9<requirements.txt
    flock 9
fi
stamp=.venv/requirements.sha256
wanted=$(cat requirements.txt pyproject.toml scripts/setup.sh | sha256sum)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && .venv/bin/python -c pass 2>/dev/null; then
    exit 0
fi

python=$(find_python) || exit 2
echo "environment: .venv with $("$python" --version) of $python"
echo "installing the pinned requirements (torch brings its CUDA libraries: a few GB the first time)"
"$python" -m venv --clear .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile -r requirements.txt
# pip would do that with one core, which takes a minute longer; templates among the files are no Python
.venv/bin/python -m compileall -q -j 0 .venv/lib >/dev/null 2>&1 || true
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
echo "$wanted" >"$stamp"
echo "environment: ready"
