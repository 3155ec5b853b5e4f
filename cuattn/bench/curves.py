"""Rates against lengths, from rows of CSV files: what a picture shows, without drawing it."""

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cuattn.bench.peers import OWN, PEERS

Row = Mapping[str, Any]
Curve = dict[int, float]  # length -> rate, or ratio
#: Columns that every drawn row needs.
COMMON = ("figure", "provider", "length", "gpu")
#: Columns that say what figures depend on, by their name in a picture; a file may lack some.
VERSIONS = {
    "torch": "torch",
    "cudnn": "cuDNN",
    "nvrtc": "NVRTC",
    "libraries": "",
    "driver": "driver",
    "commit": "cuattn",
    "contract": "contract",
}
#: Other ways to launch cuattn, which are not drawn: "cuattn launch", "cuattn 4 splits".
_OWN_VARIANTS = ("launch", "splits")


@dataclass(frozen=True)
class Kind:
    """How a figure's rows are drawn: the rate's column and unit, and the panel that a row with these columns is in."""

    title: str
    rate: str
    unit: str
    panel: Callable[[Row], str]
    columns: tuple[str, ...]
    length: str = "length"


def _dense(row: Row) -> str:
    values = "" if row["value_dim"] == row["head_dim"] else f", V {row['value_dim']}"
    return f"{row['dtype']}, D {row['head_dim']}{values}, {row['mask']}"


def _chunk(row: Row) -> str:
    return f"over {int(row['keys']) - int(row['length'])} cached tokens"


def _decode(row: Row) -> str:
    pages = "" if row["page_size"] in ("0", 0) else f", pages of {row['page_size']}"
    return f"{row['heads']}/{row['kv_heads']} heads, batch {row['batch']}{pages}"


_DENSE = ("dtype", "head_dim", "value_dim", "mask")
#: By the column "figure".
KINDS = {
    "forward": Kind("prefill", "tflops", "TFLOP/s", _dense, _DENSE),
    "backward": Kind("gradients", "tflops", "TFLOP/s", _dense, _DENSE),
    "forward+backward": Kind("forward and backward pass", "tflops", "TFLOP/s", _dense, _DENSE),
    "chunk": Kind("chunked prefill", "tflops", "TFLOP/s", _chunk, ("keys",), "new tokens"),
    "decode": Kind(
        "decode", "gb_per_s", "GB/s", _decode, ("heads", "kv_heads", "batch", "page_size"), "tokens in the cache"
    ),
}


@dataclass
class Picture:
    """One figure on one GPU. panels: by name, a curve for each provider."""

    gpu: str
    figure: str
    versions: str
    panels: dict[str, dict[str, Curve]] = field(default_factory=dict)

    @property
    def kind(self) -> Kind:
        return KINDS[self.figure]

    def prices(self) -> dict[str, Curve]:
        """cuattn's rate over that of the fastest peer, by panel; without those that have no peer."""
        prices = {}
        for name, curves in self.panels.items():
            peers = [curve for provider, curve in curves.items() if provider in PEERS]
            own = curves.get(OWN, {})
            beside = {length: [curve[length] for curve in peers if length in curve] for length in own}
            prices[name] = {length: own[length] / max(rates) for length, rates in beside.items() if rates}
        return {name: curve for name, curve in prices.items() if curve}


def read(paths: Iterable[Path]) -> list[Row]:
    """The rows of CSV files that benchmarks have written.

    Raises ValueError for a file that lacks columns which its figures need, or has none to draw.
    """
    rows: list[Row] = []
    for path in paths:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or ()
            _demand(path, columns, COMMON)
            found = [row for row in reader if row["figure"] in KINDS]
        for figure in dict.fromkeys(row["figure"] for row in found):
            _demand(path, columns, (KINDS[figure].rate, *KINDS[figure].columns))
        if not found:
            raise ValueError(f"{path}: got no rows to draw, expected some whose figure is {', '.join(KINDS)}")
        rows += found
    return rows


def _demand(path: Path, columns: Sequence[str], needed: Sequence[str]) -> None:
    missing = [name for name in needed if name not in columns]
    if missing:
        raise ValueError(f"{path}: got the columns {', '.join(columns) or 'none'}, expected also {', '.join(missing)}")


def pictures(rows: Iterable[Row]) -> list[Picture]:
    """A picture for each figure and GPU; panels with fewer than two lengths are left out, and so is a repeated pass.

    Raises ValueError for two rates of the same provider at the same place.
    """
    drawn = [row for row in rows if _is_drawn(row)]
    found: dict[tuple[str, str], Picture] = {}
    for row in drawn:
        place = row["gpu"], row["figure"]
        if place not in found:
            same = [other for other in drawn if (other["gpu"], other["figure"]) == place]
            found[place] = Picture(*place, versions_of(same))
        picture = found[place]
        panel, provider, length = picture.kind.panel(row), row["provider"], int(row["length"])
        curve = picture.panels.setdefault(panel, {}).setdefault(provider, {})
        if length in curve:
            raise ValueError(f"{row['figure']}, {panel}, {provider}, {length}: got two rates, expected one")
        curve[length] = float(row[picture.kind.rate])
    for picture in found.values():
        picture.panels = {name: curves for name, curves in picture.panels.items() if len(lengths_of(curves)) > 1}
    return [picture for picture in found.values() if picture.panels]


def lengths_of(curves: Mapping[str, Curve]) -> list[int]:
    return sorted({length for curve in curves.values() for length in curve})


def versions_of(rows: Sequence[Row]) -> str:
    """What the rows say that they depend on."""
    parts = []
    for column, name in VERSIONS.items():
        values = dict.fromkeys(str(row[column]) for row in rows if row.get(column) not in (None, "", "none"))
        parts += [" ".join(filter(None, (name, " and ".join(values))))] if values else []
    return ", ".join(parts)


def _is_drawn(row: Row) -> bool:
    kind = KINDS.get(row["figure"])
    own_variant = row["provider"].startswith(OWN) and row["provider"].endswith(_OWN_VARIANTS)
    return kind is not None and row.get(kind.rate) not in (None, "") and row.get("pass") != "again" and not own_variant
