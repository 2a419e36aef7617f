"""What of the TensorRT plugins is checked without TensorRT's headers; test_plugin_adapters.py has the rest."""

from __future__ import annotations

import re

import pytest
from plugin_library import ATTENTION, SOURCES, WRITE

from saw_trtllm.format import FORMAT_VERSION


def test_the_versions_are_one():
    header = (SOURCES / "names.h").read_text()
    assert re.search(r'kVersion\[\] = "(\w+)"', header)[1] == str(FORMAT_VERSION)


def test_only_the_entry_points_are_exported():
    exports = (SOURCES / "exports.map").read_text()
    names = re.search(r"global:(.*?)local:\s*\*;", exports, re.S)[1].replace(";", " ").split()
    assert names == ["initSawTrtllmPlugins", "getCreators", "getPluginCreators", "setLoggerFinder"]


@pytest.mark.parametrize("name", [WRITE, ATTENTION])
def test_the_readme_has_no_name_of_its_own(name):
    known = set(re.findall(r'\[\] = "(\w+)"', (SOURCES / "names.h").read_text()))
    listed = re.findall(r"^\| `(\w+)`", (SOURCES / f"{name}.md").read_text(), re.M)
    assert set(listed) <= known
    assert len(listed) > 20
