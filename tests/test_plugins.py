"""What of the TensorRT plugins is checked without TensorRT's headers; test_plugin_adapters.py has the rest."""

from __future__ import annotations

import re

import pytest
from plugin_library import NAMES, SOURCES

from saw_trtllm import plugins
from saw_trtllm.format import FORMAT_VERSION


def test_the_versions_are_one():
    header = (SOURCES / "names.h").read_text()
    assert re.search(r'kVersion\[\] = "(\w+)"', header)[1] == str(FORMAT_VERSION)


def test_only_the_entry_points_are_exported():
    exports = (SOURCES / "exports.map").read_text()
    names = re.search(r"global:(.*?)local:\s*\*;", exports, re.S)[1].replace(";", " ").split()
    assert names == ["initSawTrtllmPlugins", "getCreators", "getPluginCreators", "setLoggerFinder"]


@pytest.mark.parametrize("name", NAMES)
def test_the_readme_has_no_name_of_its_own(name):
    known = set(re.findall(r'\[\] = "(\w+)"', (SOURCES / "names.h").read_text()))
    listed = re.findall(r"^\| `(\w+)`", (SOURCES / f"{name}.md").read_text(), re.M)
    assert set(listed) <= known
    assert len(listed) > 4


@pytest.mark.parametrize(
    ("folder", "name"),
    [("cu13/lib", "libcublasLt.so.13"), ("cublas/lib", "libcublasLt.so.12"), ("", "libcublasLt.so.12"), (None, None)],
)
def test_cublas_lt_is_found_on_the_loaders_path_and_in_packages(folder, name, tmp_path, monkeypatch):
    there = None if name is None else str(tmp_path / "nvidia" / folder / name) if folder else name
    opened = []

    def load(path):
        if path != there:
            raise OSError
        opened.append(path)

    if folder:
        (tmp_path / "nvidia" / folder).mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("ctypes.CDLL", load)
    assert plugins.load_cublas_lt() == (there is not None)
    assert opened == [there] * (there is not None)
