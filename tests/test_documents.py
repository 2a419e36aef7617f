"""What the documents point to is there: links, modules that are run, and files of the package."""

from __future__ import annotations

import re
import subprocess

import pytest

from tests.support import ROOT

LISTED = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True)
DOCUMENTS = LISTED.stdout.split()


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_and_modules_are_there(name):
    document = ROOT / name
    text = document.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#\s]+)", text)
    missing = [x for x in links if "://" not in x and not (document.parent / x).exists()]
    for module in re.findall(r"python3? -m ((?:benchmarks|saw_trtllm|tests)(?:\.[a-z_]+)*)", text):
        place = ROOT / module.replace(".", "/")
        if not (place.is_dir() or place.with_suffix(".py").is_file()):
            missing.append(module)
    assert not missing


def test_the_file_that_trtllm_build_is_given_is_there():
    text = (ROOT / "docs" / "tensorrt_llm.md").read_text(encoding="utf-8")
    (path,) = re.findall(r"submodule_search_locations\[0\]\)\"\)/(\S+)", text)
    assert (ROOT / "saw_trtllm" / path).is_file()
