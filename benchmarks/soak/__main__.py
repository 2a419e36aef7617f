"""Soaks the runtime in requests, and gives damaged files and malformed messages to whatever reads them.

    python -m benchmarks.soak                                            # all, in minutes
    python -m benchmarks.soak --requests 100000 --files 0 --server_requests 0

Requests go through the engine's loop, scheduler and block manager over an executor that fails now and then, with
clients that abort, drop and cancel; each text is compared with the one that it must be. Files are those of engines,
checkpoints, models and calibrations. Malformed HTTP and gRPC requests go to a tritonserver that is started for them.

It ends with the counts of each section, in capitals what must not happen, and with code 1 if any of that did.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path

from benchmarks.soak.files import soak_files
from benchmarks.soak.requests import soak_requests
from benchmarks.soak.server import soak_server
from saw_trtllm.build import build, plan_build
from saw_trtllm.plan.options import BuildOptions

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny_llama"


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for flag, number in (("requests", 100_000), ("files", 1000), ("server_requests", 2000)):
        parser.add_argument(f"--{flag}", type=int, default=number, metavar="N", help="0 is none (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random (default: %(default)s)")
    args = parser.parse_args()
    lost = 0
    if args.requests:
        lost += report("requests", soak_requests(args.requests, args.seed))
    if args.files:
        lost += report("files", soak_files(args.files, args.seed, EXAMPLE))
    if args.server_requests:
        with tempfile.TemporaryDirectory() as folder:
            options = {"model_dir": EXAMPLE, "backend": "reference", "max_seq_len": 256}
            build(plan_build(BuildOptions(output_dir=Path(folder) / "engine", **options)))
            lost += report("server", soak_server(args.server_requests, args.seed, Path(folder) / "engine"))
    return int(lost > 0)


def losses(counts: Counter[str]) -> int:
    """How often something happened that must not."""
    return sum(number for name, number in counts.items() if name.isupper())


def report(section: str, counts: Counter[str]) -> int:
    """Print a section's counts; its losses."""
    print(f"{section}: " + ", ".join(f"{name} {number:,}" for name, number in sorted(counts.items())), flush=True)
    return losses(counts)


if __name__ == "__main__":
    sys.exit(main())
