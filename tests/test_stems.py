"""One stem an operation, in every layer: the table in plugins/README.md, held against the tree."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.support import ROOT

PLUGINS = ROOT / "plugins"
TABLE = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (PLUGINS / "README.md").read_text().splitlines()
    if line.startswith("|") and not line.startswith("|---")
]
HEADER, ROWS = TABLE[0], {row[0].strip("`"): row[1:] for row in TABLE[1:]}
#: Where an operation's files lie that the table must name, by column.
FOLDERS = {
    "kernel": "plugins/include/saw/{}",
    "launcher": "plugins/src/{}",
    "plugin": "plugins/tensorrt/{}.cpp",
    "binding": "plugins/python/{}.cpp",
    "Python": "saw_trtllm/ops/{}.py",
    "reference": "saw_trtllm/backends/reference/{}.py",
    "benchmark": "benchmarks/kernels/{}.py",
}


def links(cell: str) -> list[str]:
    """Paths from the project's root."""
    found = re.findall(r"\]\(([^)]+)\)", cell)
    return [str((PLUGINS / link).resolve().relative_to(ROOT.resolve())) for link in found]


def test_every_operation_has_a_row():
    folders = {path.name for path in (PLUGINS / "include" / "saw").iterdir() if path.is_dir()} - {"common"}
    plugins = {path.stem for path in (PLUGINS / "tensorrt").glob("*.md")}
    assert set(ROWS) == folders | plugins


@pytest.mark.parametrize("operation", ROWS)
def test_a_row_names_the_files_that_are_there(operation):
    for column, cell in zip(HEADER[1:], ROWS[operation], strict=True):
        for path in links(cell):
            assert (ROOT / path).exists(), f"{column}: {path}"
        expected = FOLDERS[column].format(operation) if column in FOLDERS else f"tests/ops/test_{operation}"
        if list(ROOT.glob(f"{expected}*")):
            assert any(path.startswith(expected) for path in links(cell)), f"{column} must name {expected}"


@pytest.mark.parametrize("operation", ROWS)
def test_a_launcher_and_a_kernel_have_the_operations_name(operation):
    """So that a search for it finds every layer, and nothing of it lies elsewhere."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    found = [Path(path) for path in listed if operation in path]
    assert {"plugins", "tests"} <= {path.parts[0] for path in found}
    symbol = re.compile(rf"\bsaw_{operation}\(")
    definitions = [path for path in (PLUGINS / "src").rglob("*.cu") if symbol.search(path.read_text())]
    assert all(path.parent.name == operation for path in definitions)
