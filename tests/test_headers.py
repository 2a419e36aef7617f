"""Each header of the kernels compiles alone, and all of them in one unit: who includes one need not know the others."""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support import plugin_library as lib

INCLUDE = lib.ROOT / "plugins" / "include"
HEADERS = sorted(str(path.relative_to(INCLUDE)) for path in INCLUDE.rglob("*.*h"))

pytestmark = pytest.mark.skipif(not lib.nvcc(), reason="there is no nvcc: pip install 'saw-trtllm[kernels]'")


def compile_unit(unit: Path, headers: list[str]) -> str:
    """Compile a unit of headers for the GPU, as far as PTX; what nvcc has to say."""
    unit.write_text("".join(f'#include "{header}"\n' for header in headers))
    flags = ["-std=c++17", "-arch=compute_90a", f"-I{INCLUDE}", "--ptx", "-o", str(unit.with_suffix(".ptx"))]
    done = subprocess.run([*lib.nvcc(), *flags, str(unit)], capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else done.stderr or f"nvcc ended with {done.returncode}"


def test_each_header_compiles_alone(tmp_path):
    assert len(HEADERS) > 20
    units = [tmp_path / f"{i}.cu" for i in range(len(HEADERS))]
    with ThreadPoolExecutor(2) as pool:
        said = pool.map(compile_unit, units, [[header] for header in HEADERS])
        failed = {header: text for header, text in zip(HEADERS, said, strict=True) if text}
    assert failed == {}


@pytest.mark.parametrize("headers", [HEADERS, HEADERS[::-1]], ids=["in order", "in reverse"])
def test_all_headers_compile_together(headers, tmp_path):
    assert compile_unit(tmp_path / "all.cu", headers) == ""
