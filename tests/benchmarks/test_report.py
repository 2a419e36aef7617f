"""Documents show their records' numbers, and nothing in them is edited by hand; tables, places and plots."""

import re
import shutil

import pytest

from benchmarks.__main__ import RECORDS, load_report, main
from benchmarks.common.record import Environment
from benchmarks.common.report import Report, align, environment_table, fill, markdown, write
from benchmarks.common.target import Limit, target_table
from saw_trtllm.errors import ConfigError
from tests.support import ROOT
from tests.support.rejection import rejected

FILES = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
DOCS = ROOT / "docs"
PLACE = re.compile(r"(<!--\w[^>]*-->).*?(<!--/-->)", re.DOTALL)


def test_documents_and_plots_are_those_of_the_records(tmp_path, capsys):
    docs = tmp_path / "docs"
    docs.mkdir()
    originals = [*DOCS.glob("*.md"), ROOT / "README.md"]
    for path in originals:
        emptied = PLACE.sub(r"\1\2", path.read_text(encoding="utf-8"))
        (docs / path.name if path.parent == DOCS else tmp_path / path.name).write_text(emptied, encoding="utf-8")
    assert main(["report", *map(str, FILES), "--output", str(docs)]) == 0
    written = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    for path in written:
        assert (tmp_path / path).read_text() == (ROOT / path).read_text(), f"python -m benchmarks report: {path}"
    plots = {path.name for path in written if path.suffix == ".svg"}
    assert plots == {path.name for path in (DOCS / "plots").iterdir()}
    shown = "".join(path.read_text() for path in originals)
    assert all(f"](plots/{name})" in shown for name in plots)
    assert {path.stem for path in FILES} == set(re.findall(r"<!--(\w+) ", shown)), "a record that no document shows"


def test_each_command_has_a_record():
    assert {load_report(path) and path.name.split("_")[0].removesuffix(".json") for path in FILES} == set(RECORDS) - {
        "scaling"  # whose first run on a GPU is to come
    }


def test_a_place_that_the_record_does_not_know_changes_nothing(tmp_path):
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "a.md"
    page.write_text("<!--x one-->old<!--/--> <!--x tow--><!--/-->")
    with pytest.raises(ConfigError, match="<!--x tow-->"):
        list(write(tmp_path / "docs", {"x": Report({}, {"one": "1"})}))
    assert "old" in page.read_text()


def test_places_of_other_records_stay():
    text = "<!--x one-->0<!--/--> <!--y one-->0<!--/--> <!-- a comment -->"
    assert (
        fill(text, {"x": Report({}, {"one": "1"})}) == "<!--x one-->1<!--/--> <!--y one-->0<!--/--> <!-- a comment -->"
    )


def test_columns_of_numbers_stand_to_the_right():
    assert markdown([["what", "µs", "x | y"], ["a", "1.5", "b"], ["b", "-", "1"]]).splitlines() == [
        "| what | µs | x \\| y |",
        "| --- | ---: | --- |",
        "| a | 1.5 | b |",
        "| b | - | 1 |",
    ]


def test_a_table_without_rows_is_not_shown_on_a_terminal():
    assert align({"one": [["a"], ["b"]], "none": [["a"]]}) == "one\na\nb"


def test_what_is_not_known_of_a_machine_has_no_row():
    environment = Environment(
        saw_trtllm="1", commit="abc", dirty=True, command="it | tee", date=None, cores=4, threads=2
    )
    assert environment_table(environment, ["model", "small"])[1:] == [
        ["cores", "4, of which 2 compute"],
        ["saw_trtllm", "1, commit abc, with changes"],
        ["model", "small"],
        ["command", "`it | tee`"],
    ]


def test_a_limit_is_met_on_its_side():
    least, most = Limit(0.9), Limit(1.0, least=False)
    assert [least.met(0.9), least.met(0.899), most.met(1.0), most.met(1.001)] == [True, False, True, False]
    table = target_table([(("a",), least.judge("much", 0.95, "%")), (("b",), most.judge("little", None))], ("case",))
    assert table == [
        ["case", "must", "measured", "met"],
        ["a", "much", "95.0 %", "yes"],
        ["b", "little", "not measured", "-"],
    ]


@pytest.mark.parametrize(
    ("text", "needed"),
    [
        (None, "does not exist"),
        ("{", "cannot be read as JSON"),
        ("[]", "not a JSON object"),
        ('{"kind": "other"}', "kind 'other': give a record of python -m benchmarks kernels, gemm, engine, scaling"),
        ('{"kind": "kernels", "schema_version": 7}', "schema_version 7: this version reads 1"),
        ('{"kind": "engine", "schema_version": 1}', "is not what python -m benchmarks engine --output writes"),
    ],
)
def test_a_file_that_is_no_record(text, needed, tmp_path, capsys):
    path = tmp_path / "x.json"
    if text is not None:
        path.write_text(text)
    assert needed in rejected(capsys, main, "report", path, "--output", tmp_path)


def test_the_report_wants_a_folder(tmp_path, capsys):
    shutil.copy(FILES[0], tmp_path)
    assert "is not a folder" in rejected(capsys, main, "report", tmp_path / FILES[0].name, "--output", tmp_path / "no")
