"""Pictures of CSV files: rates against lengths, and the price of invariance.

For each GPU and each of the figures forward, chunk, decode, backward and forward+backward in the files: "rate", a panel
for each dtype, head dim and mask (decode: heads and batch), a line for each provider; "price", the rate of cuattn over
that of the fastest peer in the same panel. A panel needs two lengths. The same rows give the same files, SVG and PNG,
with the same version of matplotlib.
"""

import argparse
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cuattn.bench.curves import KINDS, Curve, Picture, Row, lengths_of, pictures, read
from cuattn.bench.options import folder
from cuattn.bench.peers import OWN, PEERS
from cuattn.errors import MissingDependencyError

FORMATS = ("svg", "png")
NOTHING = "nothing to draw: got no rates, expected some of two lengths or more"
#: Colours that are told apart with any sight, by Okabe and Ito; the first is cuattn's, then those of the peers.
COLOURS = ("#000000", "#d55e00", "#0072b2", "#009e73", "#999999", "#e69f00", "#cc79a7", "#56b4e9", "#8b6f1d")
MARKERS = "osD^vXP*h"
#: In inches: a panel, what stands above panels, below them, to the right and between, and a line of the legend.
WIDTH, HEIGHT, TOP, BOTTOM, RIGHT, GAP, LEGEND = 4.0, 2.5, 0.95, 0.6, 0.2, 0.75, 0.18
LEGEND_COLUMNS = 4
#: More panels than these stand in four columns.
MANY = 8
#: The same file from the same rows: text stays text, and names inside the file are no random ones.
SETTINGS = {"svg.hashsalt": "cuattn", "svg.fonttype": "none", "font.size": 9.0, "font.family": "DejaVu Sans"}
METADATA: dict[str, dict[str, Any]] = {"svg": {"Date": None, "Creator": None}, "png": {"Software": None}}


def import_matplotlib() -> Any:
    """matplotlib; raises MissingDependencyError where it is missing."""
    try:
        import matplotlib
    except ImportError as error:
        raise MissingDependencyError(f"pictures need matplotlib ({error}): pip install 'cuattn[bench]'") from error
    return matplotlib


def draw(rows: Iterable[Row], to: Path) -> list[Path]:
    """Draws the rows of a benchmark into a folder; returns the files: none where no rates have two lengths."""
    matplotlib = import_matplotlib()
    to.mkdir(parents=True, exist_ok=True)
    files = []
    with matplotlib.rc_context(SETTINGS):
        for picture in pictures(rows):
            shown = {"rate": _rates(picture)}
            if prices := picture.prices():
                shown["price"] = _prices(picture, prices)
            for name, figure in shown.items():
                files += _save(figure, to / f"{slug(picture.gpu)}-{slug(picture.figure)}-{name}")
    return files


def slug(text: str) -> str:
    """Small letters and digits, with hyphens between."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _save(figure: Any, path: Path) -> list[Path]:
    files = []
    for form in FORMATS:
        files.append(path.with_name(f"{path.name}.{form}"))
        figure.savefig(files[-1], format=form, metadata=METADATA[form], dpi=120)
    return files


def _grid(picture: Picture, title: str, panels: int, entries: int) -> tuple[Any, list[Any]]:
    """A figure with its title, room for a legend of so many entries, and axes for so many panels."""
    from matplotlib.figure import Figure

    columns = 1 if panels == 1 else 2 if panels <= MANY else 4
    lines = math.ceil(panels / columns)
    panel = max(WIDTH, (2 * WIDTH + GAP) / columns) if columns < 4 else WIDTH
    width = columns * (panel + GAP) + RIGHT
    bottom = BOTTOM + LEGEND * math.ceil(entries / LEGEND_COLUMNS)
    height = lines * (HEIGHT + GAP) - GAP + TOP + bottom
    figure = Figure(figsize=(width, height))
    axes = figure.subplots(lines, columns, squeeze=False)
    left, top = GAP / width, 1 - TOP / height
    figure.subplots_adjust(left, bottom / height, 1 - RIGHT / width, top, GAP / panel, GAP / HEIGHT)
    figure.text(left, 1 - 0.3 / height, f"{picture.gpu}: {title}", fontsize=12, fontweight="bold")
    figure.text(left, 1 - 0.52 / height, picture.versions, fontsize=7, color="#555555")
    used = list(itertools.islice(axes.flat, panels))
    for unused in itertools.islice(axes.flat, panels, None):
        unused.set_axis_off()
    return figure, used


def _rates(picture: Picture) -> Any:
    providers = sorted({name for curves in picture.panels.values() for name in curves}, key=_rank)
    title = f"{picture.kind.title}, {picture.kind.unit}"
    figure, axes = _grid(picture, title, len(picture.panels), len(providers))
    lines: dict[str, Any] = {}
    for axis, (name, curves) in zip(axes, picture.panels.items(), strict=True):
        axis.set_title(name, fontsize=9)
        for provider in sorted(curves, key=_rank):
            lines[provider] = _line(axis, curves[provider], _rank(provider), slug(f"{name} {provider}"))
        _finish(axis, lengths_of(curves), picture.kind.length)
    _legend(figure, {name: lines[name] for name in providers})
    return figure


def _prices(picture: Picture, prices: Mapping[str, Curve]) -> Any:
    """All panels' in one, so that they can be compared."""
    figure, (axis,) = _grid(picture, f"the price of invariance, {picture.kind.title}", 1, len(prices))
    axis.set_title(f"rate of {OWN} over that of the fastest peer", fontsize=9)
    axis.axhline(1, color="#999999", linewidth=1, linestyle="--", gid="as-fast-as-the-fastest-peer")
    lines = {
        name: _line(axis, curve, number + 1, slug(f"price {name}"))
        for number, (name, curve) in enumerate(prices.items())
    }
    _finish(axis, lengths_of(prices), picture.kind.length)
    _legend(figure, lines)
    return figure


def _line(axis: Any, curve: Curve, rank: int, gid: str) -> Any:
    """The rank chooses colour and marker; the name stands in an SVG file."""
    lengths = sorted(curve)
    style = {"color": COLOURS[rank % len(COLOURS)], "marker": MARKERS[rank % len(MARKERS)], "markersize": 4}
    style |= {"linewidth": 2 if rank == 0 else 1.2, "linestyle": "-" if rank < len(COLOURS) else ":"}
    (line,) = axis.plot(lengths, [curve[length] for length in lengths], gid=gid, **style)
    return line


def _rank(provider: str) -> int:
    """cuattn first, the peers in their order, then others."""
    order = (OWN, *PEERS, f"{OWN} portable")
    return order.index(provider) if provider in order else len(order)


def _finish(axis: Any, lengths: Sequence[int], label: str) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [f"{n // 1024}K" if n >= 1024 and n % 1024 == 0 else str(n) for n in lengths])
    axis.minorticks_off()
    axis.set_ylim(bottom=0)
    axis.set_xlabel(label, fontsize=8)
    axis.grid(color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)


def _legend(figure: Any, lines: Mapping[str, Any]) -> None:
    columns = min(LEGEND_COLUMNS, len(lines))
    figure.legend(list(lines.values()), list(lines), loc="lower center", ncols=columns, frameon=False, fontsize=8)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("csv", type=Path, nargs="+", metavar="CSV", help="files that benchmarks have written by --csv")
    parser.add_argument("--figure", nargs="+", choices=KINDS, default=list(KINDS), help="default: all in the files")
    parser.add_argument("--to", type=folder, metavar="FOLDER", default=Path(), help="default: this folder")


def run(options: argparse.Namespace) -> int:
    import_matplotlib()
    try:
        files = draw((row for row in read(options.csv) if row["figure"] in options.figure), options.to)
    except ValueError as error:
        options.usage_error(f"CSV: {error}")
    print("\n".join(map(str, files)) or NOTHING)
    return int(not files)
