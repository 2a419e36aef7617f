"""Tables and plots that are made from a record alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.kernels.record import Results
from saw_trtllm.errors import BackendUnavailableError, ConfigError

Table = list[list[str]]


def environment_table(results: Results) -> Table:
    """Where the record came from."""
    e = results.environment
    commit = e.commit or "unknown"
    rows = [
        ["what", "value"],
        ["GPU", e.gpu],
        ["driver, CUDA", f"{e.driver or 'unknown'}, {e.cuda or 'unknown'}"],
        ["PyTorch, Triton", f"{e.torch}, {e.triton or 'none'}"],
        ["FlashInfer", e.flashinfer or "left out"],
        ["official kernels, SHA-256", e.official[:16] if e.official else "left out"],
        ["saw_trtllm", f"{e.saw_trtllm}, commit {commit}{', with changes' if e.dirty else ''}"],
        ["read bandwidth", f"{results.bandwidth.read_gbps:.0f} GB/s (sum over 4 GiB)"],
        ["copy bandwidth", f"{results.bandwidth.copy_gbps:.0f} GB/s (copy of 4 GiB, read and written)"],
        ["before each run", results.flush],
        ["date", e.date],
        ["command", f"`{e.command}`"],
    ]
    return rows


def markdown(table: Table) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table]
    lines.insert(1, "|" + " --- |" * len(table[0]))
    return "\n".join(lines)


def align(sections: dict[str, Table]) -> str:
    """Tables with their names above them and aligned columns, without those that have no row."""
    parts = []
    for name, table in sections.items():
        if len(table) == 1:
            continue
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in table]
        parts.append("\n".join([name, *lines]))
    return "\n\n".join(parts)


def fill_sections(document: Path, sections: dict[str, Table]) -> None:
    """As :func:`fill_in`, for tables by the names of their markers."""
    text = document.read_text(encoding="utf-8")
    for name, table in sections.items():
        pattern = re.compile(rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        body = markdown(table)
        text, count = pattern.subn(lambda found, body=body: f"{found[1]}{body}\n{found[2]}", text)
        if count != 1:
            raise ConfigError(
                f"{document} has {count} places for the table {name}: write <!-- begin {name} --> and "
                f"<!-- end {name} --> on lines of their own, once"
            )
    document.write_text(text, encoding="utf-8")


_SETTINGS = {"font.size": 9, "axes.grid": True, "grid.alpha": 0.3}


def draw_plots(folder: Path, plots: dict[str, Callable[[Any], None]]) -> list[Path]:
    """Draw ``NAME.svg`` for each of some functions that draw on a figure's axes; raises as :func:`draw`."""
    try:
        import matplotlib
        from matplotlib.figure import Figure

        from saw_trtllm.svg import save_svg
    except ModuleNotFoundError as e:
        raise BackendUnavailableError(
            f"the report needs {e.name}, which is not installed: pip install 'saw-trtllm[bench]'"
        ) from e
    written = []
    for name, plot in plots.items():
        with matplotlib.rc_context(_SETTINGS):
            figure = Figure(figsize=(7.2, 4.0), layout="constrained")
            axes = figure.add_subplot()
            plot(axes)
            axes.legend(fontsize=8, framealpha=0.9)
            path = folder / f"{name}.svg"
            try:
                folder.mkdir(parents=True, exist_ok=True)
                save_svg(figure, path)
            except OSError as e:
                raise ConfigError(f"{path} cannot be written ({e.strerror}): give a folder of yours") from e
        written.append(path)
    return written
