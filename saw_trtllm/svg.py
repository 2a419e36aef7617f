"""Plots as SVG: text as text, a fifth to a third of matplotlib's bytes, and the same bytes for the same numbers."""

from __future__ import annotations

import io
import re
import string
import xml.etree.ElementTree as ET
from collections import Counter
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
_STRAIGHT = re.compile(rf"(m{_NUMBER} ?{_NUMBER}[hv]{_NUMBER})+")
_TICK = re.compile(rf"m0 0([hv]{_NUMBER})")
#: A round marker: curves and nothing else, from its lowest point on.
_CIRCLE = re.compile(rf"m0 ({_NUMBER})c[-0-9.cs ]+z")
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
    for element in root.iter():
        _tidy(element, drawn)
    for element in list(root.iter()):
        _join(element)
    _hoist(root, "font-size", "")
    _hoist(root, "text-anchor", "start")
    root.set("font-family", _FONT)
    ET.register_namespace("", _SVG)
    return ET.tostring(root, encoding="unicode").replace(" />", "/>") + "\n"


def save_svg(figure: Figure, path: Path) -> None:
    """Write a figure to ``path``."""
    path.write_text(to_svg(figure), encoding="utf-8")


def _tidy(element: ET.Element, drawn: dict[str, ET.Element]) -> None:
    """Shorten what scour leaves: no coordinate needs six decimals, no line attributes that a line before has."""
    have = element.attrib
    # Each text would name its fonts, of which matplotlib lists a dozen; here the root does.
    have.pop("font-family", None)
    if have.get("transform", "").startswith("rotate(-0 "):
        del have["transform"]
    for key in have.keys() & {"x", "y", "width", "height"}:
        have[key] = re.sub(r"-?\d+\.\d+", lambda n: f"{float(n[0]):.1f}".removesuffix(".0"), have[key])
    if circle := _CIRCLE.fullmatch(have.get("d", "")):
        element.tag = f"{{{_SVG}}}circle"
        have["r"] = circle[1]
        del have["d"]
    if _HREF in have:
        have["href"] = have.pop(_HREF)
        shown = drawn.get(have["href"])
        if shown is not None:  # it has a stroke of its own
            have.pop("stroke", None)
            have.pop("stroke-width", None)
            if tick := _TICK.fullmatch(shown.get("d", "")):
                element.tag = _PATH
                look = {key: value for key, value in shown.attrib.items() if key not in ("id", "d")}
                have |= look | {"d": f"m{have.pop('x')} {have.pop('y')}{tick[1]}"}
                del have["href"]


def _join(element: ET.Element) -> None:
    """Make one path of lines of one look: those in a row, and bars and ticks with nothing but such between them."""
    paths: list[ET.Element] = []
    for child in list(element):
        if child.tag == _PATH and "id" not in child.attrib:
            straight = _STRAIGHT.fullmatch(child.get("d", ""))
            same = [path for path in (paths if straight else paths[-1:]) if _look(path) == _look(child)]
            if same:
                same[0].set("d", same[0].get("d", "") + _absolute(child.get("d", "")))
                element.remove(child)
            else:
                paths = [*paths, child] if straight else [child]
        elif child.find(f".//{_PATH}") is not None:
            paths = []  # they would come before what lies behind them


def _hoist(root: ET.Element, key: str, default: str) -> None:
    """Let the texts inherit what most of them have."""
    texts = [e for e in root.iter() if e.tag == f"{{{_SVG}}}text"]
    most, _ = Counter(e.get(key, default) for e in texts).most_common(1)[0]
    root.set(key, most)
    for e in texts:
        own = e.attrib.pop(key, default)
        if own != most:
            e.set(key, own)


def _look(path: ET.Element) -> dict[str, str]:
    return {key: value for key, value in path.attrib.items() if key != "d"}


def _absolute(data: str) -> str:
    """Path data that means the same behind others: its first move, ``m``, may be followed by lines without a letter."""
    place, rest = _MOVE.fullmatch(data).groups()
    return f"M{place}{'l' if rest[:1] not in string.ascii_letters else ''}{rest}"
