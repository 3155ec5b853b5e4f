"""Rates of attention in operations a second, their roof, and how rows are stored and shown."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

from cuattn.bench import timing
from cuattn.bench.results import Results, notes
from cuattn.bench.timing import Times

#: Columns of `rows_of`.
RATES = (*timing.COLUMNS, "tflops", "percent_of_roof", *timing.RATIOS)
#: Rows and columns of the matrices whose product is the roof.
ROOF_SIZE = 8192
T = TypeVar("T")
NO_REASONS: Mapping[str, str] = MappingProxyType({})


def attention_flop(
    batch: int, heads: int, len_q: int, len_k: int, head_dim: int, mask: str, value_dim: int | None = None
) -> float:
    """Floating-point operations that are counted: for each query row and key that it sees, 2 head_dim + 2 value_dim.

    A causal row sees half a key less than it does: the convention of other published figures, with which a square
    problem costs half of a full one. It gives no credit for the masked part of the tiles on the diagonal. Exponentials
    are not counted.
    """
    pairs = len_q * (len_k - len_q / 2) if mask == "causal" else len_q * len_k
    return 2 * batch * heads * pairs * (head_dim + (value_dim or head_dim))


def measure_roof(repeats: int) -> Times:
    """An 8192^3 matrix product in bf16."""
    import torch

    a, b = (torch.randn(ROOF_SIZE, ROOF_SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return timing.time_in_turns({"matmul": lambda: a @ b}, repeats)


def rows_of(
    labels: Mapping[str, Any], times: Times, flop: float, roof: float, reasons: Mapping[str, str] = NO_REASONS
) -> list[dict[str, Any]]:
    """CSV rows, a provider each: the rate of ``flop`` operations a call, and its share of ``roof`` in FLOP/ms; and one
    for each provider without times, with the reason.
    """
    rows: list[dict[str, Any]] = []
    for name, ms in timing.medians(times).items():
        figures = {**timing.figures(times[name]), **timing.ratios(name, times)}
        rate = {"tflops": f"{flop / ms / 1e9:.1f}", "percent_of_roof": f"{100 * flop / ms / roof:.1f}"}
        rows.append({**labels, "provider": name, **figures, **rate})
    return rows + notes(labels, reasons)


def line_of(row: Mapping[str, Any], others: Sequence[str] = ()) -> str:
    """One row for a reader: rate or memory, and ratios; or why there are none."""
    if row.get("note"):
        return f"not measured: {row['note']}"
    if "peak_bytes" in row:
        held = f"{row['length']:6} tokens: {row['peak_bytes'] / 1e6:.1f} MB, {row['bytes_per_token']} bytes a token"
        return f"{held} {timing.shown_ratios(row)}"
    rate = f"{row['tflops']:>6} TFLOP/s {row['percent_of_roof']:>5} % of roof"
    return f"{rate} {timing.shown_ratios(row, others)} ({row['ms_min']} to {row['ms_max']} ms)"


def print_summary(rows: Sequence[Mapping[str, Any]], figure: str, names: Sequence[str]) -> None:
    """TFLOP/s of cuattn and its peers, by dtype: a line for each dtype, head dim and mask, a column for each length."""
    rates: dict[tuple[Any, ...], dict[int, dict[str, str]]] = {}
    for row in rows:
        if row["figure"] == figure and row["pass"] == "first" and "tflops" in row:
            lengths = rates.setdefault((row["dtype"], row["head_dim"], row["value_dim"], row["mask"]), {})
            lengths.setdefault(row["length"], {})[row["provider"]] = f"{float(row['tflops']):.0f}"
    shown = ("cuattn", *names)
    print(f"\n{figure}, TFLOP/s by length: " + " / ".join(shown))
    for (dtype, head_dim, value_dim, mask), lengths in rates.items():
        cells = [f"{n}: " + " / ".join(rate.get(name, "-") for name in shown) for n, rate in lengths.items()]
        print(f"{dtype} d{head_dim:<3} v{value_dim:<3} {mask:6} " + "   ".join(cells))


class Recorder:
    """Stores rows and shows them."""

    def __init__(self, results: Results, repeats: int) -> None:
        self.results = results
        self.repeats = repeats
        self.refused = 0

    def add(self, problem: Any, rows: Sequence[Mapping[str, Any]], others: Sequence[str] = ()) -> None:
        self.results.add(rows)
        for row in rows:
            label = f"{problem} {row['figure']:16} {row['pass']:5} {row['provider']:17}"
            print(label, line_of(row, others), flush=True)

    def add_roof(self, again: str) -> float:
        """Measures the roof; returns it, in FLOP/ms."""
        times = measure_roof(self.repeats)
        flop = 2.0 * ROOF_SIZE**3
        roof = flop / timing.medians(times)["matmul"]
        labels = {"figure": "roof", "pass": again, "dtype": "bfloat16", "length": ROOF_SIZE}
        self.add("roof", rows_of(labels, times, flop, roof))
        return roof

    def accepted(self, problem: Any, measured: T | str) -> T | None:
        """What was measured; None if it is the reason why nothing was."""
        if isinstance(measured, str):
            self.refuse(problem, measured)
            return None
        return measured

    def refuse(self, problem: Any, reason: str) -> None:
        """Counts and shows a problem that is not timed."""
        self.refused += 1
        print(f"{problem} REFUSED: {reason}", flush=True)
