"""Starts a server over an executor that computes nothing: ``python -m benchmarks.streams.bootstrap PACE COMMAND ...``.

COMMAND is saw-serve or saw-triton, as on the command line. Triton's models run in processes of their own, so that
their executor is exchanged where they begin: in the repository's ``model.py``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from unittest import mock

from benchmarks.common.null_executor import Pace, patched
from saw_trtllm.cli import triton
from saw_trtllm.serve import names, repository


def main(argv: list[str]) -> int:
    """Run the command."""
    pace, command, *flags = argv

    def write(folder: Path, configs: dict) -> None:
        repository.write_repository(folder, configs)
        model = folder / names.TENSORRT_LLM / names.VERSION / "model.py"
        first = f"from benchmarks.common.null_executor import Pace, patched\n\npatched(Pace.parse({pace!r})).start()\n"
        model.write_text(first + model.read_text(encoding="utf-8"), encoding="utf-8")

    with patched(Pace.parse(pace)):
        if command == "saw-serve":
            from saw_trtllm.cli import serve

            return serve.main(flags)
        with mock.patch("saw_trtllm.cli.triton.write_repository", write):
            return triton.main(flags)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
