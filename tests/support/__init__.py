"""What tests share: stand-ins, models, executors, tolerances."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
