"""Caches of a checkpoint on two texts, from the command to the tables and plots that documents show."""

import argparse
import json
import re
import typing

import pytest
from matplotlib.figure import Figure

from benchmarks.__main__ import load_report, main
from benchmarks.accuracy import programs, tasks
from benchmarks.accuracy.report import _position_table
from benchmarks.common.report import align
from tests.support.example import EXAMPLE


@pytest.mark.parametrize("own_text", [True, False])
def test_a_checkpoint_on_two_texts(own_text, tmp_path, capsys):
    output = tmp_path / "accuracy_example.json"
    argv = ["accuracy", "--model_dir", EXAMPLE, "--text", typing.__file__, "--calibration_text", argparse.__file__]
    argv += ["--max_tokens", 256, "--max_seq_len", 128, "--device", "cpu", "--output", output]
    argv += ["--calibration_tokens", 1024, *([] if own_text else ["--no_own_text"])]
    assert main([str(a) for a in argv]) == 0
    assert "saw_k8v4, calibrated" in capsys.readouterr().out
    report = load_report(output)
    kl = {name.removeprefix("kl "): float(x) for name, x in report.numbers.items() if name.startswith("kl ")}
    assert kl["saw_k8v4"] < kl["saw_int4"] < kl["plain int4, min-max"]
    assert ("saw_int4, calibrated on its own text" in kl) is own_text
    header, *rows = report.tables["caches"]
    sizes = {row[0]: int(row[header.index("bytes/token")].replace(",", "")) for row in rows}
    assert sizes["saw_int4, calibrated"] == sizes["the paper's recipe"] == 4 * 2 * 136
    assert (sizes["saw_k8v4"], sizes["fp8 e4m3, no scales"]) == (4 * 2 * 200, 4 * 2 * 256)
    assert [row[0] for row in report.tables["positions"][1:]] == ["64", "127"]
    assert report.numbers["window"] == "128"
    for plot in report.plots.values():
        figure = Figure()
        plot(figure)
        assert len(figure.axes[0].get_legend().get_texts()) >= 5


def test_a_checkpoint_needs_two_texts(capsys):
    assert main(["accuracy", "--model_dir", str(EXAMPLE), "--text", "x"]) == 2
    assert "give --text and --calibration_text" in capsys.readouterr().err


def test_tasks_have_one_answer(tmp_path):
    """A number that the text has once, and the end of a chain of sums."""
    text = tmp_path / "text"
    text.write_text("word " * 50)
    argv = ["--text", text, "--words", 40, "--count", 20, "--output_dir", tmp_path]
    assert tasks.main([str(a) for a in argv]) == 0
    documents = {
        name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("saw_needle", "saw_chain")
    }
    assert {name: len(found) for name, found in documents.items()} == {"saw_needle": 20, "saw_chain": 20}
    for d in documents["saw_needle"]:
        asked = d["prompt"].rpartition("A: ")[2]
        assert d["prompt"].count(f"{asked}{d['answer']}.") == 1
        assert d["prompt"].count("word") == 40
    for d in documents["saw_chain"]:
        sums = [tuple(map(int, s)) for s in re.findall(r"(\d+) \+ (\d+) = (\d+)", d["prompt"] + d["answer"])]
        assert all(a + b == total for a, b, total in sums)
        assert len(sums) == 5 * 3
    assert f"test: {tmp_path / 'saw_chain.jsonl'}" in (tmp_path / "saw_chain.yaml").read_text()


def test_a_program_is_right_if_it_gives_what_its_reference_gives():
    """The reference is; another result, none, an error, no Python and no end are not."""
    document = programs.programs(1)[0]
    assert programs.is_right(document, document["answer"])
    assert programs.is_right(document, f" 1 +{document['answer']} - 1")
    for wrong in (" x", "", " x +", " x / 0", " [0 for _ in iter(int, 1)]"):
        assert not programs.is_right(document, wrong), wrong


def test_every_reference_is_right():
    """One program for each kind, run with what it is called with."""
    for document in programs.programs(len(programs._KINDS), seed=1):
        calls = json.loads(document["calls"])
        space: dict = {}
        exec(document["head"] + document["answer"], space)
        assert all(space["f"](*call) is not None for call in calls), document


def test_a_text_may_be_too_short_to_hide_a_fact_in(tmp_path, capsys):
    (tmp_path / "text").write_text("one two")
    argv = ["--text", tmp_path / "text", "--words", 3, "--output_dir", tmp_path]
    assert tasks.main([str(a) for a in argv]) == 2
    assert "the text has 2 words and --words is 3: give a longer text" in capsys.readouterr().err


def test_positions_are_words_in_a_table_before_they_have_been_in_a_file():
    """JSON makes texts of the keys that a run has as numbers."""
    table = _position_table({"int4": {"kl_by_position": {64: 0.125}}})
    assert align({"positions": table}).splitlines()[-1].split() == ["64", "0.1250"]
