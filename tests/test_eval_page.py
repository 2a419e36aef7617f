"""docs/accuracy.md is what its numbers make it: neither is edited by hand."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_page_is_its_numbers(tmp_path):
    spec = importlib.util.spec_from_file_location("accuracy_page", ROOT / "benchmarks" / "accuracy_page.py")
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    data = page.read(ROOT / "docs" / "accuracy" / "results.json.gz")
    page.write(data, tmp_path)
    written = (tmp_path / "accuracy.md").read_text()
    assert written == (ROOT / "docs" / "accuracy.md").read_text()
    plots = {path.name for path in (tmp_path / "accuracy").iterdir()}
    assert plots == {path.name for path in (ROOT / "docs" / "accuracy").glob("*.svg")}
    assert all(f"accuracy/{name}" in written for name in plots)
