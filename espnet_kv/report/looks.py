"""What the figures share: colours, signs, units and panels."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from espnet_kv.report.models import origin
from espnet_kv.report.profiles import Profile

# inline in a page these four become the page's own, light or dark (see `figures.inline_svg`)
INK, MUTED, GRID, PAPER = "#22262c", "#69707a", "#d9dce1", "#fefefe"
CONV, INPUT = "#9aa1ab", "#c3c8cf"
# Okabe and Ito's palette: told apart by the colour-blind too, and on dark ground
COLOURS = {"mha": "#0072b2", "gqa": "#d55e00", "mla": "#009e73", "linear": "#cc79a7"}
OTHER_COLOUR = "#7a68c9"
MARKERS = {"conformer": "o", "branchformer": "s", "e_branchformer": "D", "transformer": "^"}
OTHER_MARKER = "P"
FILLS = {"trained": "full", "converted": "none", "fine-tuned": "bottom"}

STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "figure.facecolor": PAPER,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "text.parse_math": False,  # a dollar sign in a name is one
}
WIDE, NARROW = 8.4, 4.3  # inches


@dataclass(frozen=True, eq=False)
class Entry:
    """One model of the report, and how it is drawn: attention is colour, encoder is marker."""

    profile: Profile
    name: str

    @property
    def encoder(self) -> str:
        return self.profile.model.encoder

    @property
    def short(self) -> str:
        """Its name without that of the encoder."""
        return self.name.removeprefix(f"{self.encoder} ")

    @property
    def colour(self) -> str:
        return COLOURS.get(self.profile.model.attention_type, OTHER_COLOUR)

    @property
    def marker(self) -> dict[str, Any]:
        """Keyword arguments of a line; what is filled says where the weights come from."""
        return {
            "marker": MARKERS.get(self.encoder, OTHER_MARKER),
            "color": self.colour,
            "markerfacecolor": self.colour,
            "markerfacecoloralt": PAPER,
            "fillstyle": FILLS[origin(self.profile)],
            "markersize": 8,
            "markeredgewidth": 1.4,
        }


def by_encoder(entries: Sequence[Entry]) -> dict[str, list[Entry]]:
    """The models of each encoder, in their order."""
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        found.setdefault(entry.encoder, []).append(entry)
    return found


@contextmanager
def style() -> Iterator[None]:
    """matplotlib's settings while figures are drawn and saved."""
    with matplotlib.rc_context(STYLE):
        yield


def panels(
    count: int, narrow: bool, height: float, columns: int = 2, **shared: Any
) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels, side by side or, when narrow, below each other.

    Args:
        height: of a panel in inches.
        columns: panels beside each other at most.
        shared: sharex, sharey of `Figure.subplots`.
    """
    columns = 1 if narrow else min(columns, count)
    rows = -(-count // columns)
    width = NARROW if narrow else WIDE
    figure = Figure(figsize=(width, rows * height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **shared).flatten()
    for axis in axes[count:]:
        axis.set_visible(False)
    return figure, list(axes[:count])


def lay_out(figure: Figure) -> None:
    """Find the places of all panels once and for all: afterwards places in pixels are final."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


def size(value: float) -> str:
    """Bytes for a person: 81.9 kB."""
    return _with_unit(value, (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0)))


def duration(value: float) -> str:
    """Seconds for a person: 30.0 s, 10.0 min."""
    return _with_unit(value, (("min", 60.0), ("s", 1.0)))


def milliseconds(value: float) -> str:
    """ms for a person: 6.20 ms, 1.50 s."""
    return _with_unit(value, (("s", 1e3), ("ms", 1.0)))


def on_ticks(written: Callable[[float], str]) -> FuncFormatter:
    """`written` without zeros at the end, as ticks have them."""
    zeros = re.compile(r"\.0+(?= )|(?<=\.\d)0(?= )")
    return FuncFormatter(lambda value, _: zeros.sub("", written(value)))


def _with_unit(value: float, units: Sequence[tuple[str, float]]) -> str:
    """Three figures of `value` and the largest unit that is not above it."""
    unit, factor = next((u for u in units if abs(value) >= u[1]), units[-1])
    amount = value / factor
    decimals = 0 if abs(amount) >= 100 or unit == "B" else 1 if abs(amount) >= 10 else 2
    return f"{amount:.{decimals}f} {unit}"


def log_axis(axis: Any, written: Callable[[float], str], fine: bool) -> None:
    """Make `axis` (axes.xaxis or yaxis) logarithmic, with 1 (2, 5) labelled as `written` says."""
    (axis.axes.set_xscale if axis.axis_name == "x" else axis.axes.set_yscale)("log")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if fine else (1,)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(on_ticks(written))


def fine_ticks(values: Sequence[float], narrow: bool = True) -> bool:
    """Whether an axis of `values` has room for labels at 2 and 5 as well as at powers of ten."""
    return max(values) / min(values) < (60 if narrow else 600)


def length_axis(axis: Axes, seconds: Sequence[float], room: float) -> None:
    """A logarithmic x of audio lengths: ticks where something was measured.

    Args:
        room: the share of the axis that stays free on the right.
    """
    axis.set_xscale("log")
    ticks = sorted(set(seconds))
    axis.xaxis.set_major_locator(FixedLocator(ticks))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(on_ticks(duration))
    span = max(ticks[-1] / ticks[0], 2.0)
    axis.set_xlim(ticks[0] / span**0.03, ticks[-1] * span ** (room / (1 - room)))
