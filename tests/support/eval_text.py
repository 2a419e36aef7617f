"""Text that the example model has not read, from the standard library of the Python that runs.

The example's held-out files were chosen by a hash of their names (``prepare`` in examples/tiny_llama/train.py); these
are of them and in every Python. Calibration uses a file that it was trained on, so that the two never share a text.
"""

from __future__ import annotations

import argparse
import html.parser
import typing
import urllib.request
from pathlib import Path
from xml.sax import expatreader

from saw_trtllm.runtime.tokenizer import Tokenizer
from tests.support.example import EXAMPLE

HELD_OUT = [Path(m.__file__) for m in (urllib.request, typing, html.parser, expatreader)]
CALIBRATION = [Path(argparse.__file__)]


def held_out_text() -> str:
    """About 90,000 tokens."""
    return "\n".join(path.read_text(encoding="utf-8") for path in HELD_OUT)


def held_out_ids(n: int) -> list[int]:
    """The first n tokens of the held-out text."""
    return _first(held_out_text(), n)


def calibration_ids(n: int) -> list[int]:
    """The first n tokens of the calibration text."""
    return _first("\n".join(path.read_text(encoding="utf-8") for path in CALIBRATION), n)


def _first(text: str, n: int) -> list[int]:
    ids = Tokenizer.load(EXAMPLE).encode(text)
    assert len(ids) >= n
    return ids[:n]
