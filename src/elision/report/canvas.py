"""One figure with its words and its numbers, as inline SVG, PNG and CSV.

Figures are drawn with matplotlib's object API in a fixed light palette (Okabe and Ito's, which colour-blind readers
can tell apart). On the way to SVG every colour becomes a CSS variable, so that the page around it decides between light
and dark; text stays text, in the page's font; ids are prefixed, so that many SVGs can stand in one document. PNG keeps
the light palette.
"""

from __future__ import annotations

import csv
import io
import re
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import matplotlib
from matplotlib.figure import Figure

# name: (light, dark). The hues are Okabe and Ito's; on a dark page they are lighter.
THEME = {
    "ink": ("#1c2024", "#e8eaed"),
    "muted": ("#5f6872", "#9aa4af"),
    "line": ("#dde1e6", "#30363d"),
    "paper": ("#ffffff", "#16191d"),
    "blue": ("#0072b2", "#4fa8dc"),
    "vermillion": ("#d55e00", "#ff8a47"),
    "green": ("#009e73", "#33c296"),
    "purple": ("#cc79a7", "#e29cc3"),
    "orange": ("#e69f00", "#f2b632"),
    "sky": ("#56b4e9", "#7cc6f1"),
}

INK, MUTED, LINE, PAPER, BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = (light for light, _ in THEME.values())
_NAMES = {light: name for name, (light, _) in THEME.items()}

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.6,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.labelsize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.facecolor": "none",
    "axes.unicode_minus": True,
    "figure.facecolor": "none",
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "text.parse_math": False,  # a dollar in a name is a dollar
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "xtick.major.width": 0.6,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.handlelength": 1.6,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "lines.markersize": 5,
}


@dataclass(frozen=True)
class Plot:
    """One figure with its words and its numbers."""

    name: str  # of the files beside the page, and the prefix of its ids
    title: str
    caption: str  # how to read it
    description: str  # what it shows, for those who do not see it
    figure: Figure
    header: tuple[str, ...]
    rows: list[tuple[Any, ...]]

    def __post_init__(self) -> None:
        """Lay the figure out once, for both of its renderings."""
        with matplotlib.rc_context(STYLE):
            self.figure.draw_without_rendering()
            self.figure.set_layout_engine("none")

    def svg(self) -> str:
        """An <svg> element for an HTML document: labelled, themed by the document's CSS variables."""
        buffer = io.StringIO()
        with matplotlib.rc_context({**STYLE, "svg.hashsalt": self.name}):
            self.figure.savefig(buffer, format="svg", metadata={"Date": None})
        return _inline(buffer.getvalue(), self.name, self.title, self.description)

    def file(self) -> str:
        """The same as an SVG file of its own, which follows its reader's light or dark setting."""
        light, dark = ("".join(f"--{name}:{pair[mode]};" for name, pair in THEME.items()) for mode in (0, 1))
        style = f":root{{{light}--sans:system-ui,sans-serif}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}"
        start, end = self.svg().split(">", 1)
        return f'{start} xmlns="http://www.w3.org/2000/svg"><style>{style}</style>{end}\n'

    def png(self) -> bytes:
        """A PNG on white, about 1000 pixels wide."""
        buffer = io.BytesIO()
        with matplotlib.rc_context(STYLE):
            self.figure.savefig(buffer, format="png", dpi=220, facecolor=PAPER, metadata={"Title": self.title})
        return buffer.getvalue()

    def csv(self) -> str:
        """The numbers behind the plot, unrounded."""
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerows([self.header, *self.rows])
        return buffer.getvalue()


def _inline(text: str, prefix: str, title: str, description: str) -> str:
    """Matplotlib's SVG file as an element of an HTML document."""
    root = ElementTree.fromstring(text)
    referenced = set(re.findall(r'(?:url\(|href=")#([^")]+)', text))
    for element in list(root.iter()):
        element.tag = element.tag.rpartition("}")[2]
        for unwanted in [child for child in element if child.tag.rpartition("}")[2] in ("metadata", "style")]:
            element.remove(unwanted)
        for key, value in list(element.attrib.items()):
            del element.attrib[key]
            key = key.rpartition("}")[2]
            if key == "id" and value not in referenced:
                continue
            element.attrib[key] = _attribute(key, value, prefix)
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.attrib |= {"role": "img", "aria-labelledby": f"{prefix}-title {prefix}-description"}
    for place, (tag, words) in enumerate((("title", title), ("desc", description))):
        element = ElementTree.Element(tag, {"id": f"{prefix}-{'title' if tag == 'title' else 'description'}"})
        element.text, element.tail = words, "\n"
        root.insert(place, element)
    return ElementTree.tostring(root, encoding="unicode")


def _attribute(key: str, value: str, prefix: str) -> str:
    if key == "id":
        return f"{prefix}-{value}"
    if key == "style":
        value = re.sub(r"#[0-9a-f]{6}\b", lambda match: f"var(--{_NAMES[match[0]]})", value)
        value = re.sub(r"(font:[^;]*?px)[^;]*", r"\1 var(--sans)", value)
    value = re.sub(r"url\(#", f"url(#{prefix}-", value)
    if key == "href":
        return f"#{prefix}-{value.removeprefix('#')}"
    if key in ("d", "x", "y", "points", "transform"):
        value = re.sub(r"-?\d+\.\d{3,}", lambda match: f"{float(match[0]):.2f}", value)
    return value
