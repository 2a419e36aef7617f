# Sourced by the other scripts: makes .venv with the package and everything that the demo and the tests need.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Triton's Python backend loads the interpreter as a library, so one that is built as a library comes first.
find_python() {
    local candidate wanted
    for wanted in 1 0; do
        for candidate in python3 python3.12 python3.11 python3.10; do
            if "$candidate" - "$wanted" 2>/dev/null <<'PYTHON'; then
import sys, sysconfig
shared = int(bool(sysconfig.get_config_var("Py_ENABLE_SHARED")))
sys.exit(not ((3, 10) <= sys.version_info < (3, 13) and shared >= int(sys.argv[1])))
PYTHON
                echo "$candidate"
                return
            fi
        done
    done
    echo "error: no Python 3.10, 3.11 or 3.12 was found: install one (with its venv module) and put it on PATH" >&2
    return 2
}

# The stamp names what was installed from, so that an unchanged environment is used again.
stamp="$(cksum < pyproject.toml)"
if [[ "$(cat .venv/stamp 2>/dev/null)" != "$stamp" ]]; then
    python="$(find_python)"
    echo "== making .venv with $("$python" --version)" >&2
    "$python" -m venv --clear .venv
    .venv/bin/pip install -qq --disable-pip-version-check --editable '.[reference,eval,triton,client,kernels,test]' >&2
    echo "$stamp" > .venv/stamp
fi
export PATH="$PWD/.venv/bin:$PATH"
