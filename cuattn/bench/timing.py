"""Timing on a CUDA device. Providers are functions by name; they take turns, so that a change of clocks meets all."""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from cuattn.bench import peers
from cuattn.bench.peers import Call

Times = dict[str, list[float]]  # of each provider, milliseconds of one call

#: The keys of `figures`, and those of `ratios`.
COLUMNS = ("ms", "ms_min", "ms_max", "repeats")
RATIOS = tuple(f"ratio_to_{peer}" for peer in peers.PEERS)
#: One timed stretch lasts about this long, so that the resolution of events does not count.
STRETCH_MS = 4.0
#: Bytes that calls in a row must go through for each to find a cold L2 cache: three times the 50 MB of an H200.
COLD_BYTES = 150e6


def rotating(calls: Sequence[Call]) -> Call:
    """A function of which every call is the next one of these."""
    turns = itertools.cycle(calls)
    return lambda: next(turns)()


def time_in_turns(providers: Mapping[str, Call], repeats: int) -> Times:
    """Each provider ``repeats`` times, in turns, by CUDA events around calls in a row."""
    import torch

    def stretch(name: str, count: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with peers.setting_of(name):
            start.record()
            for _ in range(count):
                providers[name]()
            end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / count

    counts = {}
    for name in providers:
        stretch(name, 3)  # compiles, loads, warms up
        counts[name] = max(2, round(STRETCH_MS / stretch(name, 3)))
    times: Times = {name: [] for name in providers}
    for _ in range(repeats):
        for name in providers:
            times[name].append(stretch(name, counts[name]))
    return times


def time_graphs(providers: Mapping[str, Sequence[Call]], repeats: int) -> tuple[Times, dict[str, str]]:
    """The same of calls that are captured in a CUDA graph, each provider's in one; a time is one call's share.

    Also says of each of the peers that cannot be captured why: it has no times.
    """
    captured = {name: _captured(name, calls) for name, calls in providers.items()}
    reasons = {name: reason for name, reason in captured.items() if isinstance(reason, str)}
    times = time_in_turns({name: replay for name, replay in captured.items() if not isinstance(replay, str)}, repeats)
    return {name: [ms / len(providers[name]) for ms in samples] for name, samples in times.items()}, reasons


def _captured(name: str, calls: Sequence[Call]) -> Call | str:
    """A replay of the calls, or why there is none."""
    try:
        return _graph_of(name, calls)
    except Exception as error:
        if name not in peers.PEERS:
            raise
        return peers.first_line(error)


def _graph_of(name: str, calls: Sequence[Call]) -> Call:
    import torch

    with peers.setting_of(name):
        for call in calls:  # whatever the first call compiles, loads or chooses cannot be captured
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
    replay: Call = graph.replay
    return replay


def figures(samples: Sequence[float]) -> dict[str, Any]:
    """Median, smallest, largest and number of times, as columns of a CSV file."""
    ms = {"ms": statistics.median(samples), "ms_min": min(samples), "ms_max": max(samples)}
    return {**{column: f"{value:.5f}" for column, value in ms.items()}, "repeats": len(samples)}


def medians(times: Times) -> dict[str, float]:
    return {name: statistics.median(samples) for name, samples in times.items()}


def ratios(name: str, times: Times) -> dict[str, str]:
    """A provider's speed over each peer's, by column: above 1 is faster."""
    ms = medians(times)
    return {f"ratio_to_{peer}": f"{ms[peer] / ms[name]:.3f}" for peer in peers.PEERS if peer in ms}


def shown_ratios(row: Mapping[str, Any], others: Sequence[str] = ()) -> str:
    """A row's ratios to peers, and to others, for a reader."""
    names = (*peers.PEERS, *others)
    return " ".join(f"{float(row['ratio_to_' + name]):.2f} x {name}" for name in names if f"ratio_to_{name}" in row)
