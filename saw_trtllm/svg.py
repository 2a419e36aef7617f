"""Plots as SVG: text as text, a fifth to a third of matplotlib's bytes, and the same bytes for the same numbers."""

from __future__ import annotations

import io
import re
import string
import xml.etree.ElementTree as ET
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure
from scour import scour

_FONT = "'DejaVu Sans', 'Arial', sans-serif"
_SETTINGS = {"svg.fonttype": "none", "svg.hashsalt": "saw", "font.sans-serif": ["DejaVu Sans", "Arial"]}
_OPTIONS = scour.sanitizeOptions()
_OPTIONS.digits = 3
_OPTIONS.strip_xml_prolog = _OPTIONS.strip_ids = _OPTIONS.strip_comments = _OPTIONS.remove_metadata = True
_OPTIONS.indent_type, _OPTIONS.newlines = "none", False

_SVG = "http://www.w3.org/2000/svg"
_HREF = "{http://www.w3.org/1999/xlink}href"
_PATH = f"{{{_SVG}}}path"
_NUMBER = r"-?(?:\d+\.?\d*|\.\d+)"
_MOVE = re.compile(rf"m({_NUMBER} ?{_NUMBER}) ?(.*)")
#: matplotlib's names: a letter and ten hexadecimal digits, of which five tell those of one plot apart.
_NAME = re.compile(r"\b([mp][0-9a-f]{5})[0-9a-f]{5}\b")


def to_svg(figure: Figure) -> str:
    """The element ``<svg>`` of a figure, as it stands in a page or in a file of its own."""
    buffer = io.StringIO()
    with mpl.rc_context(_SETTINGS):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = scour.scourString(buffer.getvalue(), _OPTIONS)
    root = ET.fromstring(_NAME.sub(r"\1", text[text.index("<svg") :]))
    drawn = {"#" + e.get("id", ""): e for e in root.iter() if "stroke" in e.attrib}
    for element in list(root.iter()):
        _tidy(element, drawn)
    root.set("font-family", _FONT)
    ET.register_namespace("", _SVG)
    return ET.tostring(root, encoding="unicode").replace(" />", "/>") + "\n"


def save_svg(figure: Figure, path: Path) -> None:
    """Write a figure to ``path``."""
    path.write_text(to_svg(figure), encoding="utf-8")


def _tidy(element: ET.Element, drawn: dict[str, ET.Element]) -> None:
    """Shorten what scour leaves: no coordinate needs six decimals, no line attributes that the line before has."""
    have = element.attrib
    # Each text would name its fonts, of which matplotlib lists a dozen; here the root does.
    have.pop("font-family", None)
    if have.get("transform", "").startswith("rotate(-0 "):
        del have["transform"]
    for key in have.keys() & {"x", "y", "width", "height"}:
        have[key] = re.sub(r"-?\d+\.\d+", lambda n: f"{float(n[0]):.1f}".removesuffix(".0"), have[key])
    if _HREF in have:
        have["href"] = have.pop(_HREF)
        if have["href"] in drawn:  # what it shows has its own
            have.pop("stroke", None)
            have.pop("stroke-width", None)
    last = None
    for child in list(element):
        if child.tag == _PATH and "id" not in child.attrib:
            if last is not None and _look(last) == _look(child):
                last.set("d", last.get("d", "") + _absolute(child.get("d", "")))
                element.remove(child)
            else:
                last = child
        elif child.find(f".//{_PATH}") is not None:
            last = None  # it would come before what lies behind it


def _look(path: ET.Element) -> dict[str, str]:
    return {key: value for key, value in path.attrib.items() if key != "d"}


def _absolute(data: str) -> str:
    """Path data that means the same behind others: its first move, ``m``, may be followed by lines without a letter."""
    place, rest = _MOVE.fullmatch(data).groups()
    return f"M{place}{'l' if rest[:1] not in string.ascii_letters else ''}{rest}"
