"""What a call costs its thread: from Python's entry to its return, of each function, for problems of little work.

On a CUDA device beside torch's scaled_dot_product_attention, all without synchronisation. With ``--stub`` there need be
no device: the driver, the current device and its stream are stand-ins that do nothing, tensors of the CPU take the part
of tensors on a GPU, and what is left is the cost of this package and of torch around a launch. Figures are the median
over batches of calls, and the smallest batch, in microseconds of one call.
"""

import argparse
import contextlib
import os
import platform
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from common import write_csv
from timing import Call

import cuattn
from cuattn import dispatch, env, launch, replay
from cuattn.tensor_map import encode_emulated

WARM_UP = 100
#: Calls of a batch, whose launches fit into a device's queue.
BATCH = 100


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
        patch.object(dispatch.emulator, "run", lambda launches: None),
        patch.dict(os.environ, {env.BACKEND: "emulator:sm_90a"}),
    ):
        replay.forget()
        yield
        replay.forget()


def calls_on(device: str) -> dict[str, Call]:
    """Each function with arrays on a device; one block or a few for each launch."""

    def normal(*shape: int) -> Any:
        return torch.randn(shape, dtype=torch.float16, device=device)

    def numbers(*values: int) -> Any:
        return torch.tensor(values, dtype=torch.int32, device=device)

    q, k, v, row = normal(1, 2, 128, 64), normal(1, 2, 128, 64), normal(1, 2, 128, 64), normal(1, 2, 1, 64)
    keys, values, starts = normal(1, 2, 2048, 64), normal(1, 2, 2048, 64), numbers(0, 128)
    packed, packed_starts = [normal(128, 2, 64) for _ in range(3)], (starts, starts.clone())
    token, new, caches = normal(1, 1, 2, 64), [normal(1, 1, 2, 64) for _ in "kv"], [normal(8, 16, 2, 64) for _ in "kv"]
    lengths, table = numbers(20), numbers(3, 1).view(1, 2)
    dout, out, lse = normal(1, 2, 128, 64), normal(1, 2, 128, 64), torch.zeros(1, 2, 128, device=device)
    return {
        "attention": lambda: cuattn.attention(q, k, v, "causal"),
        "attention, LSE returned": lambda: cuattn.attention(q, k, v, "causal", return_lse=True),
        "attention, one row, 2 launches": lambda: cuattn.attention(row, keys, values),
        "attention_varlen": lambda: cuattn.attention_varlen(*packed, *packed_starts, "causal"),
        "attention_kvcache, pages": lambda: cuattn.attention_kvcache(token, *caches, lengths, block_table=table),
        "attention_kvcache, append, 2 launches": lambda: cuattn.attention_kvcache(
            token, *caches, lengths, block_table=table, k_new=new[0], v_new=new[1]
        ),
        "attention_backward, 4 launches": lambda: cuattn.attention_backward(dout, q, k, v, out, lse, "causal"),
    }


def peer_on(device: str) -> Call:
    """torch's attention; on the CPU with next to no work, which it does within the call."""
    shape = (1, 1, 1, 8) if device == "cpu" else (1, 2, 128, 64)
    q, k, v = (torch.randn(shape, dtype=torch.float16, device=device) for _ in range(3))
    return lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stub", action="store_true", help="no device: stand-ins for what belongs to a GPU")
    parser.add_argument("--batches", type=int, default=50, help=f"of {BATCH} calls each; default: 50")
    parser.add_argument("--csv", type=Path, help="file to write the rows to")
    arguments = parser.parse_args()
    if not arguments.stub and not torch.cuda.is_available():
        parser.error("no CUDA device that torch can use; --stub needs none")
    rows = []
    with stubbed() if arguments.stub else contextlib.nullcontext():
        device = "cpu" if arguments.stub else "cuda"
        wait = (lambda: None) if arguments.stub else torch.cuda.synchronize
        facts = {
            "device": "stub" if arguments.stub else torch.cuda.get_device_name(),
            "processor": processor(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        }
        for label, call in {**calls_on(device), "torch's attention": peer_on(device)}.items():
            times = microseconds(call, arguments.batches, wait)
            median, least = statistics.median(times), min(times)
            print(f"{label:38s}{median:8.2f} us, at least {least:.2f}", flush=True)
            figures = {"us": f"{median:.2f}", "us_min": f"{least:.2f}", "calls": len(times) * BATCH}
            rows.append({"call": label, **figures, **facts})
    if arguments.csv:
        write_csv(arguments.csv, rows, list(rows[0]))


def processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


if __name__ == "__main__":
    main()
