"""Build the engines of all cases, several at a time, into the folder SAW_TEST_ENGINES names: tests then start at once.

SAW_TEST_ENGINES=DIR python tests/engine/prepare.py [--workers N] [--reference]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cases import SERVED_CASES, STEP_CASES

_BUILD = """
import sys, time
from cases import *
cases = {case.name: case for case in (*STEP_CASES, *SERVED_CASES.values())}
for name in sys.argv[2:]:
    start = time.monotonic()
    try:
        cases[name].engine(Path(sys.argv[1]))
        print(f"{name}: {time.monotonic() - start:.1f} s", flush=True)
    except Exception as e:
        print(f"{name}: {e}", flush=True)
"""


def main() -> int:
    """Build."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--reference", action="store_true", help="the reference's results instead of the engines")
    args = parser.parse_args()
    folder, here = Path(os.environ["SAW_TEST_ENGINES"]), Path(__file__).parent
    names = [case.name for case in (*STEP_CASES, *SERVED_CASES.values())]

    def run(names: list[str]) -> int:
        # One process builds several: TensorRT takes ten seconds and more to load its kernels for a first engine.
        job = [str(here / "reference.py")] if args.reference else ["-c", _BUILD]
        return subprocess.run([sys.executable, *job, str(folder), *names], cwd=here, check=False).returncode

    with ThreadPoolExecutor(args.workers) as pool:
        return max(pool.map(run, [names[i :: args.workers] for i in range(args.workers)]))


if __name__ == "__main__":
    sys.exit(main())
