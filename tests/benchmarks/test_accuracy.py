"""The numbers in docs/accuracy.md are those of its record: neither is edited by hand."""

import importlib.util
import re

from saw_trtllm.paths import read_json
from tests.support import ROOT


def test_the_page_is_its_numbers(tmp_path):
    spec = importlib.util.spec_from_file_location("accuracy_page", ROOT / "benchmarks" / "accuracy_page.py")
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    data = read_json(ROOT / "docs" / "accuracy" / "results.json.gz")
    document, copy = ROOT / "docs" / "accuracy.md", tmp_path / "accuracy.md"
    copy.write_text(re.sub("(<!--[^>]+-->).*?(<!--/-->)", r"\1\2", document.read_text(), flags=re.DOTALL))
    assert "| int4 |" not in copy.read_text()
    page.write(data, tmp_path)
    written = copy.read_text()
    assert written == document.read_text()
    plots = {path.name for path in (tmp_path / "accuracy").iterdir()}
    assert plots == {path.name for path in (ROOT / "docs" / "accuracy").glob("*.svg")}
    assert all(f"accuracy/{name}" in written for name in plots)
