"""Caches of a checkpoint on two texts, from the command to the tables and plots that documents show."""

import argparse
import typing

from matplotlib.figure import Figure

from benchmarks.__main__ import load_report, main
from benchmarks.accuracy import real
from tests.support.example import EXAMPLE


def test_a_checkpoint_on_two_texts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(real, "CALIBRATION_TOKENS", 1024)
    output = tmp_path / "accuracy_example.json"
    argv = ["accuracy", "--model_dir", EXAMPLE, "--text", typing.__file__, "--calibration_text", argparse.__file__]
    argv += ["--max_tokens", 256, "--max_seq_len", 128, "--device", "cpu", "--output", output]
    assert main([str(a) for a in argv]) == 0
    assert "saw_k8v4, calibrated" in capsys.readouterr().out
    report = load_report(output)
    kl = {name.removeprefix("kl "): float(x) for name, x in report.numbers.items() if name.startswith("kl ")}
    assert kl["saw_k8v4"] < kl["saw_int4"] < kl["plain int4, min-max"]
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
