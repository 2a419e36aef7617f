"""Builds the example model's engine."""

from pathlib import Path

from saw_trtllm.build import build, plan_build
from saw_trtllm.plan.options import BuildOptions
from tests.support import ROOT

EXAMPLE = ROOT / "examples" / "tiny_llama"


def build_example(folder: Path, **options) -> Path:
    """Write an engine to ``folder`` and return it."""
    options = {"model_dir": EXAMPLE, "backend": "reference", "max_batch_size": 64, **options}
    build(plan_build(BuildOptions(output_dir=folder, **options)))
    return folder
