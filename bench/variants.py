"""Variants of the kernel for many rows on a GPU, timed in turns in one process: between processes rates differ by more.

    python3 bench/variants.py NAME=FOLDER ... --head-dim 64 128 --length 512 2048 --csv FILE

NAME is the kernels of FOLDER, a copy of kernels_cu with a change in it, which takes the same arguments; "as it is" are
those in use. Problems and rates are those of `cuattn bench prefill`; a time is the median of the repeats. ratio: the
rate over that of "as it is". Exit status 1 if a variant has other bits than "as it is", or, so that nothing is compared
with itself, the same code.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from cuattn import env
from cuattn.bench import answers, timing
from cuattn.bench.options import add_grid, positive
from cuattn.bench.peers import Call
from cuattn.bench.prefill import Inputs, Problem, planned_launches, problems
from cuattn.bench.results import PROVENANCE, Results
from cuattn.jit import cubin_path
from cuattn.launch import Kernel, ReadyLaunch, load_anew, words_of
from cuattn.launches import Launch
from cuattn.tensor_map import argument, encode

COLUMNS = (
    *("dtype", "mask", "head_dim", "value_dim", "length", "batch", "heads", "lse"),
    *("variant", "tflops", "ratio", *timing.COLUMNS, *PROVENANCE),
)
AS_IT_IS = "as it is"
#: What kernels take is defined here, relative to their folder.
ARGUMENTS = ("attn/params.cuh", "common/tensor_map.cuh")
Outputs = tuple[Any, Any]  # output, and LSE or None


@dataclass(frozen=True)
class Variant:
    """Kernels of a folder, None for those in use."""

    folder: Path | None = None

    def prepared(self, inputs: Inputs, mask: str, lse: bool) -> tuple[Call, tuple[bytes, ...]]:
        """A call that launches and returns output and LSE, if any, and its kernels' code."""
        import torch

        variables = {env.KERNEL_DIR: str(self.folder)} if self.folder else {}
        with mock.patch.dict(os.environ, variables):
            launches, outputs = planned_launches(*inputs, mask, lse)
            stream = torch.cuda.current_stream().cuda_stream
            kernels = [load_anew(one.config) for one in launches]
            ready = []
            for one, kernel in zip(launches, kernels, strict=True):
                words = words_of(argument(one.params, one.tensor_maps, encode))
                ready.append(kernel.ready(one.grid, words, stream, one.cluster))
            code = tuple(cubin_path(one.config).read_bytes() for one in launches)

        return partial(_launched, ready, outputs, (launches, kernels)), code


def _launched(ready: Sequence[ReadyLaunch], outputs: Outputs, kept: tuple[list[Launch], list[Kernel]]) -> Outputs:
    """The outputs. Kept are the memory that launches touch, and kernels, which are unloaded with their last user."""
    for launch in ready:
        launch.launch()
    return outputs


def compare(
    problem: Problem, variants: dict[str, Variant], repeats: int, sets: int, lse: bool = False
) -> list[dict[str, Any]]:
    """A row for each variant. Raises ValueError where they cannot be compared."""
    inputs = [problem.inputs() for _ in range(sets)]
    calls: dict[str, Call] = {}
    expected: list[Any] = []
    codes: dict[tuple[bytes, ...], str] = {}
    for name, variant in variants.items():
        prepared = [variant.prepared(each, problem.mask, lse) for each in inputs]
        calls[name] = timing.rotating([call for call, _ in prepared])
        outputs = [x for call, _ in prepared for x in call() if x is not None]
        expected = expected or [x.clone() for x in outputs]
        if not all(map(answers.same_bits, outputs, expected)):
            raise ValueError(f"{problem}: {name} has other bits than {AS_IT_IS}")
        if (other := codes.setdefault(prepared[0][1], name)) != name:
            raise ValueError(f"{problem}: {name} has the code of {other}")
    times = timing.time_in_turns(calls, repeats)
    ms = timing.medians(times)
    return [
        {
            **asdict(problem),
            "lse": int(lse),
            "variant": name,
            "tflops": f"{problem.flop / ms[name] / 1e9:.1f}",
            "ratio": f"{ms[AS_IT_IS] / ms[name]:.4f}",
            **timing.figures(samples),
        }
        for name, samples in times.items()
    ]


def named(text: str) -> tuple[str, Variant]:
    name, _, path = text.partition("=")
    folder = Path(path).resolve()
    if not path or not (folder / "forward_sm90.cuh").is_file():
        raise argparse.ArgumentTypeError(f"got {text}, expected NAME=FOLDER, a folder of kernels")
    for file in ARGUMENTS:
        if (folder / file).read_bytes() != (env.kernel_dir() / file).read_bytes():
            raise argparse.ArgumentTypeError(
                f"got {text}, whose {file} is another one: its kernels take other arguments"
            )
    return name, Variant(folder)


def chosen(named_ones: Sequence[tuple[str, Variant]]) -> dict[str, Variant]:
    """By name, "as it is" first. Raises ValueError for names that stand for something else."""
    ones = [(AS_IT_IS, Variant()), *named_ones]
    names = [name for name, _ in ones]
    if len(set(names)) < len(names):
        raise ValueError(f"got the names {', '.join(names)}, expected each once")
    return dict(ones)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="+", type=named, metavar="NAME=FOLDER")
    parser.add_argument("--lse", action="store_true", help="the LSE is asked for, too")
    parser.add_argument("--repeats", type=positive, default=15)
    parser.add_argument("--csv", type=Path, help="the file to write")
    add_grid(parser, head_dim=[(64, 64), (128, 128)])
    options = parser.parse_args()
    try:
        variants = chosen(options.variants)
    except ValueError as error:
        parser.error(str(error))
    results, bad = Results(options.csv, COLUMNS), 0
    for problem in problems(options.dtype, options.head_dim, options.length, options.tokens):
        try:
            results.add(rows := compare(problem, variants, options.repeats, options.sets, options.lse))
        except ValueError as error:
            bad += 1
            print(error, file=sys.stderr, flush=True)
            continue
        shown = ", ".join(f"{row['variant']} {row['tflops']} ({row['ratio']})" for row in rows)
        print(f"{problem}: {shown}", flush=True)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
