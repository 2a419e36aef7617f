"""Benchmarks against peers, and the records and pages that come of them: ``python -m benchmarks``."""

import saw_trtllm.cli  # noqa: F401  what Ctrl-C does to a command that is still being imported
