"""The house's rules that a linter of imports cannot tell; its layers are in pyproject.toml, for import-linter."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import grimp
import pytest

PACKAGE = Path(__file__).parents[1] / "saw_trtllm"


@pytest.fixture(scope="module")
def graph():
    return grimp.build_graph("saw_trtllm", exclude_type_checking_imports=True)


def test_no_file_imports_itself_by_way_of_others(graph):
    """The root package is left out: it names the doors, and all may ask it for the version."""
    modules = graph.modules - {"saw_trtllm"}
    imports = {module: graph.find_modules_directly_imported_by(module) & modules for module in modules}
    TopologicalSorter(imports).prepare()  # raises CycleError, which names the circle


def test_only_a_backend_imports_its_modules_late():
    """``import saw_trtllm`` needs neither PyTorch nor TensorRT because of them; elsewhere they would hide an arrow."""
    late = {
        (path.relative_to(PACKAGE), inner.module)
        for path in PACKAGE.rglob("*.py")
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(function)
        if isinstance(inner, ast.ImportFrom) and (inner.module or "").startswith("saw_trtllm.backends")
    }
    assert not {(path, module) for path, module in late if path.parts[:-1] != tuple(module.split("."))[1:-1]}
