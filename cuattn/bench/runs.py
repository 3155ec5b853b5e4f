"""How a benchmark on a GPU begins and ends."""

import argparse
from collections.abc import Sequence
from typing import Any

from cuattn.bench import plots
from cuattn.bench.results import Results
from cuattn.errors import MissingDependencyError


def begin(options: argparse.Namespace, columns: Sequence[str]) -> Results:
    """Where the rows of a benchmark on a GPU go; torch is seeded.

    Wrong usage where there is no GPU; MissingDependencyError without torch, or without matplotlib for --plot.
    """
    torch = import_torch()
    if options.plot:
        plots.import_matplotlib()
    if not torch.cuda.is_available():
        options.usage_error("device: got none, expected a CUDA device that torch can use")
    torch.manual_seed(0)
    return Results(options.csv, columns)


def finish(options: argparse.Namespace, results: Results) -> None:
    """Draws what --plot asks for."""
    if options.plot:
        files = plots.draw(results.rows, options.plot)
        print("\n".join(map(str, files)) or plots.NOTHING)


def import_torch() -> Any:
    """torch; raises MissingDependencyError where it is missing."""
    try:
        import torch
    except ImportError as error:
        raise MissingDependencyError(f"benchmarks need torch ({error}): pip install 'cuattn[bench]'") from error
    return torch
