"""What a call costs its thread: from Python's entry to its return, of each function, for problems of little work.

On a CUDA device, all without synchronisation. With --stub there need be no device: the driver, the current device and
its stream are stand-ins that do nothing, tensors of the CPU take the part of tensors on a GPU, and what is left is the
cost of this package and of torch around a launch. Figures are the median over batches of calls, and the smallest batch,
in microseconds of one call.

The peers of --providers compute what the call "attention" does; on the CPU next to nothing, since they do it within the
call. Of one that cannot the note says why. The roof is one operation of torch in place, which is one launch; share of
it: its time over that of the call.
"""

import argparse
import contextlib
import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import cuattn
from cuattn import emulator, env, launch, replay
from cuattn.bench import peers, timing
from cuattn.bench.options import add_files, add_providers, chosen_peers, positive
from cuattn.bench.peers import Attempt, Call
from cuattn.bench.results import PROVENANCE, Results, notes
from cuattn.bench.runs import import_torch
from cuattn.tensor_map import encode_emulated

COLUMNS = (
    *("call", "provider", "us", "us_min", "calls", "calls_per_s", "percent_of_roof", *timing.RATIOS, "note", "device"),
    *PROVENANCE,
)

WARM_UP = 100
#: Calls of a batch, whose launches fit into a device's queue.
BATCH = 100
ROOF = "roof"


@contextlib.contextmanager
def stubbed() -> Iterator[None]:
    """Inside it calls on tensors of the CPU go the way of calls on a GPU, up to the driver, which does nothing."""
    function = SimpleNamespace(kernel=SimpleNamespace(ptr=1))
    driver = SimpleNamespace(launchKernel=lambda *arguments: None)
    with (
        patch.multiple(replay, BACKENDS=("emulator",), _current_device=lambda torch: None),
        patch.object(replay, "_is_on_device", lambda x: True),
        patch.multiple(replay, encode=encode_emulated, _bind=lambda index: None, _stream=lambda torch, index: 0),
        patch.object(replay, "loaded", lambda config, index: launch.Kernel(config, function)),
        patch.object(launch, "_driver", lambda: driver),
        patch.multiple(launch, _launch_ex=lambda: lambda *arguments: 0, _starts_early=lambda: True),
        patch.object(emulator, "run", lambda launches: None),
        patch.dict(os.environ, {env.BACKEND: "emulator:sm_90a"}),
    ):
        replay.forget()
        yield
        replay.forget()


def calls_on(device: str) -> dict[str, Call]:
    """Each function with arrays on a device; one block or a few for each launch."""
    import torch

    def normal(*shape: int) -> Any:
        return torch.randn(shape, dtype=torch.float16, device=device)

    def numbers(*values: int) -> Any:
        return torch.tensor(values, dtype=torch.int32, device=device)

    q, k, v, row = normal(1, 2, 128, 64), normal(1, 2, 128, 64), normal(1, 2, 128, 64), normal(1, 2, 1, 64)
    keys, values, starts = normal(1, 2, 2048, 64), normal(1, 2, 2048, 64), numbers(0, 128)
    packed_q, packed_k, packed_v, starts_k = normal(128, 2, 64), normal(128, 2, 64), normal(128, 2, 64), starts.clone()
    token, k_new, v_new = (normal(1, 1, 2, 64) for _ in range(3))
    k_cache, v_cache = (normal(8, 16, 2, 64) for _ in range(2))
    lengths, table = numbers(20), numbers(3, 1).view(1, 2)
    dout, out, lse = normal(1, 2, 128, 64), normal(1, 2, 128, 64), torch.zeros(1, 2, 128, device=device)
    return {
        "attention": lambda: cuattn.attention(q, k, v, "causal"),
        "attention, LSE returned": lambda: cuattn.attention(q, k, v, "causal", return_lse=True),
        "attention, one row": lambda: cuattn.attention(row, keys, values),
        "attention_varlen": lambda: cuattn.attention_varlen(packed_q, packed_k, packed_v, starts, starts_k, "causal"),
        "attention_kvcache, pages": lambda: cuattn.attention_kvcache(
            token, k_cache, v_cache, lengths, block_table=table
        ),
        "attention_kvcache, append, 2 launches": lambda: cuattn.attention_kvcache(
            token, k_cache, v_cache, lengths, block_table=table, k_new=k_new, v_new=v_new
        ),
        "attention_backward, 4 launches": lambda: cuattn.attention_backward(dout, q, k, v, out, lse, "causal"),
    }


def attempt(names: Sequence[str], device: str) -> Attempt:
    """The peers' attention; on the CPU with next to no work, which it does within the call."""
    import torch

    shape = (1, 1, 1, 8) if device == "cpu" else (1, 2, 128, 64)
    q, k, v = (torch.randn(shape, dtype=torch.float16, device=device) for _ in range(3))
    return peers.attempt(names, lambda peer: [peer.prepare(q, k, v, "causal")])


def least_on(device: str) -> Call:
    """The roof: one operation of torch in place."""
    import torch

    least: Call = torch.zeros(1, device=device).zero_
    return least


def microseconds(call: Call, batches: int, wait: Call) -> list[float]:
    """Of one call, for each batch; between batches the device catches up."""
    for _ in range(WARM_UP):
        call()
    times = []
    for _ in range(batches):
        wait()
        start = time.perf_counter()
        for _ in range(BATCH):
            call()
        times.append(1e6 * (time.perf_counter() - start) / BATCH)
    return times


def rows_of(times: Mapping[tuple[str, str], Sequence[float]], device: str) -> list[dict[str, Any]]:
    """A row for each (call, provider), of whose calls the batches took so many microseconds."""
    us = {label: statistics.median(samples) for label, samples in times.items()}
    roof = us[ROOF, "torch"]
    rows = []
    for (call, provider), samples in times.items():
        mine = us[call, provider]
        row: dict[str, Any] = {"call": call, "provider": provider, "us": f"{mine:.2f}", "us_min": f"{min(samples):.2f}"}
        row |= {"calls": len(samples) * BATCH, "calls_per_s": f"{1e6 / mine:.0f}", "device": device}
        others = {other: value for (name, other), value in us.items() if name == call and other in peers.PEERS}
        ratios = {f"ratio_to_{other}": f"{value / mine:.3f}" for other, value in others.items()}
        rows.append({**row, "percent_of_roof": f"{100 * roof / mine:.1f}", **ratios})
    return rows


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stub", action="store_true", help="no device: stand-ins for what belongs to a GPU")
    parser.add_argument("--batches", type=positive, default=50, help=f"of {BATCH} calls each; default: %(default)s")
    add_providers(parser, peers.FORWARD)
    add_files(parser, plot=False)


def run(options: argparse.Namespace) -> int:
    torch = import_torch()
    if not options.stub and not torch.cuda.is_available():
        options.usage_error("device: got none, expected a CUDA device that torch can use, or --stub")
    device = "cpu" if options.stub else "cuda"
    wait = (lambda: None) if options.stub else torch.cuda.synchronize
    tried = attempt(chosen_peers(options), device)
    times = {(ROOF, "torch"): microseconds(least_on(device), options.batches, wait)}
    with stubbed() if options.stub else contextlib.nullcontext():
        for name, call in calls_on(device).items():
            times[name, "cuattn"] = microseconds(call, options.batches, wait)
    for name, calls in tried.calls.items():
        with peers.setting_of(name):
            times["attention", name] = microseconds(calls[0], options.batches, wait)
    shown = "stub" if options.stub else torch.cuda.get_device_name()
    rows = [*rows_of(times, shown), *notes({"call": "attention", "device": shown}, tried.reasons)]
    Results(options.csv, COLUMNS).add(rows)
    for row in rows:
        figures = row.get("note") or f"{row['us']:>8} us, at least {row['us_min']} {timing.shown_ratios(row)}"
        print(f"{row['call']:38s} {row['provider']:10} {figures}", flush=True)
    return 0
