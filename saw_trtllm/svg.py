"""Plots as SVG: text as text, a third to a half of matplotlib's bytes, and the same bytes for the same numbers."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure
from scour import scour

# Each text would name its fonts, of which matplotlib lists a dozen; here the root does.
_FONT = " font-family=\"'DejaVu Sans', 'Arial', sans-serif\""
_SETTINGS = {"svg.fonttype": "none", "svg.hashsalt": "saw", "font.sans-serif": ["DejaVu Sans", "Arial"]}
_OPTIONS = scour.sanitizeOptions()
_OPTIONS.digits = 3
_OPTIONS.strip_xml_prolog = _OPTIONS.strip_ids = _OPTIONS.strip_comments = _OPTIONS.remove_metadata = True
_OPTIONS.indent_type, _OPTIONS.newlines = "none", False


def to_svg(figure: Figure) -> str:
    """The element ``<svg>`` of a figure, as it stands in a page or in a file of its own."""
    buffer = io.StringIO()
    with mpl.rc_context(_SETTINGS):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = scour.scourString(buffer.getvalue(), _OPTIONS)
    text = text[text.index("<svg") :].strip().replace(_FONT, "")
    return text.replace("<svg", "<svg" + _FONT, 1) + "\n"


def save_svg(figure: Figure, path: Path) -> None:
    """Write a figure to ``path``."""
    path.write_text(to_svg(figure), encoding="utf-8")
