"""Tables, numbers and plots that are made from a record alone, and the documents that show them.

A document has places: ``<!--RECORD NAME-->...<!--/-->``, with the record's file name without its ending and the name of
one of its tables or numbers.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.common.record import Environment
from saw_trtllm.errors import BackendUnavailableError, ConfigError
from saw_trtllm.paths import is_file, reading

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Table = list[list[str]]

_PLACE = re.compile(r"<!--(?P<record>\w+) (?P<name>[^>]+?)-->.*?<!--/-->", re.DOTALL)
_NUMBER = re.compile(r"|-|[-+]?[\d,.]+( ?(%|x|s|ms|µs|GiB))?( \(.*\))?")


@dataclass(frozen=True)
class Report:
    """What a record says.

    Attributes
    ----------
    tables : dict of str to list of list of str
        By name, each with a header.
    numbers : dict of str to str
        Single numbers and words, for sentences.
    plots : dict of str to callable
        What draws on an empty figure, by the name of its file.
    notes : list of str
        Lines that a terminal gets after the tables.
    """

    tables: dict[str, Table]
    numbers: dict[str, str] = field(default_factory=dict)
    plots: dict[str, Callable[[Figure], None]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def values(self) -> dict[str, str]:
        """The Markdown of each table, and the numbers."""
        return {name: f"\n{markdown(table)}\n" for name, table in self.tables.items()} | self.numbers

    def plain(self) -> str:
        """All tables with aligned columns."""
        return "\n".join([align(self.tables), *([""] if self.notes else []), *self.notes])


def environment_table(environment: Environment, *rows: list[str]) -> Table:
    """Where a record came from: what is known, with the rows of its own before date and command."""
    e = environment
    known = {
        "GPU": e.gpu,
        "CPU": e.cpu,
        "cores": e.cores and (f"{e.cores}, of which {e.threads} compute" if e.threads else f"{e.cores}"),
        "driver": e.driver,
        "CUDA": e.cuda,
        "TensorRT": e.tensorrt,
        "Python": e.python,
        "PyTorch": e.torch,
        "Triton": e.triton,
        "FlashInfer": e.flashinfer,
        "official kernels, SHA-256": e.official and e.official[:16],
        "saw_trtllm": f"{e.saw_trtllm}, commit {e.commit or 'unknown'}{', with changes' if e.dirty else ''}",
    }
    told = [[name, value] for name, value in known.items() if value is not None]
    end = [["date", e.date]] if e.date else []
    return [["what", "value"], *told, *rows, *end, ["command", f"`{e.command}`"]]


def markdown(table: Table) -> str:
    """A Markdown table; columns of numbers stand to the right."""
    header, *rows = [[cell.replace("|", "\\|") for cell in row] for row in table]
    numeric = [all(_NUMBER.fullmatch(cell) for cell in column) for column in zip(*rows, strict=True)]
    rule = ["---:" if right else "---" for right in numeric or [False] * len(header)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, rule, *rows])


def align(tables: dict[str, Table]) -> str:
    """Tables with their names above them and aligned columns, without those that have no row."""
    parts = []
    for name, table in tables.items():
        if len(table) == 1:
            continue
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in table]
        parts.append("\n".join([name, *lines]))
    return "\n\n".join(parts)


def fill(text: str, reports: Mapping[str, Report]) -> str:
    """A document's text with the places of some records filled in; other records' places stay as they are.

    Raises
    ------
    ConfigError
        If a record has nothing of a place's name.
    """
    values = {record: report.values for record, report in reports.items()}

    def filled(place: re.Match[str]) -> str:
        record, name = place["record"], place["name"]
        if record not in values:
            return place[0]
        if name not in values[record]:
            raise ConfigError(f"<!--{record} {name}-->: the record has no table or number of that name")
        return f"<!--{record} {name}-->{values[record][name]}<!--/-->"

    return _PLACE.sub(filled, text)


def write(folder: Path, reports: Mapping[str, Report]) -> Iterator[Path]:
    """Fill the places in a folder's documents and in the README beside it, and draw ``plots/RECORD_PLOT.svg``.

    Of a record that documents show, the plots that they show are drawn; of another one, all.

    Yields
    ------
    Path
        Each plot, and each document that shows something of the records.

    Raises
    ------
    SawError
        If a place has a name that its record does not know, matplotlib or scour is missing, or a file cannot be
        written.
    """
    documents = [*sorted(folder.glob("*.md")), folder.parent / "README.md"]
    texts = {}
    for path in filter(is_file, documents):
        with reading(path):
            texts[path] = path.read_text(encoding="utf-8")
    records = {path: {place["record"] for place in _PLACE.finditer(text)} for path, text in texts.items()}
    filled = {path: fill(texts[path], reports) for path, there in records.items() if there & set(reports)}
    for record, report in reports.items():
        shown = "".join(texts[path] for path, there in records.items() if record in there)
        names = {f"{record}_{name}": plot for name, plot in report.plots.items()}
        yield from draw(folder / "plots", {n: p for n, p in names.items() if not shown or f"plots/{n}.svg" in shown})
    for path, text in filled.items():
        _write(path, text)
        yield path


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as e:
        raise ConfigError(f"{path} cannot be written ({e.strerror}): give a folder of yours") from e


#: One look for all plots; the last three make the same bytes of the same numbers, with text as text, and drop points of
#: curves that nobody sees.
_STYLE = {
    "font.size": 9,
    "font.sans-serif": ["DejaVu Sans", "Arial"],
    "axes.grid": True,
    "axes.titlesize": 9,
    "grid.alpha": 0.3,
    "legend.fontsize": 8,
    "legend.framealpha": 0.9,
    "svg.fonttype": "none",
    "svg.hashsalt": "saw",
    "path.simplify_threshold": 0.5,
}


def draw(folder: Path, plots: Mapping[str, Callable[[Figure], None]]) -> list[Path]:
    """Draw ``NAME.svg`` of each plot into a folder.

    Raises
    ------
    SawError
        If matplotlib or scour is missing, or a file cannot be written.
    """
    if not plots:
        return []
    try:
        import matplotlib
        from matplotlib.figure import Figure
        from scour import scour
    except ModuleNotFoundError as e:
        raise BackendUnavailableError(
            f"the report needs {e.name}, which is not installed: pip install 'saw-trtllm[bench]'"
        ) from e
    options = scour.sanitizeOptions()
    options.digits, options.indent_type, options.newlines = 4, "none", False
    options.strip_xml_prolog = options.strip_ids = options.strip_comments = options.remove_metadata = True
    written = []
    for name, plot in plots.items():
        with matplotlib.rc_context(_STYLE):
            figure = Figure(figsize=(7.2, 4.0), layout="constrained")
            plot(figure)
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", metadata={"Date": None})
        written.append(folder / f"{name}.svg")
        _write(written[-1], scour.scourString(buffer.getvalue(), options))
    return written
