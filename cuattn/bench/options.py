"""Options that the benchmarks share."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from cuattn import config as configs
from cuattn.bench.peers import OWN

HeadDims = tuple[int, int]  # of queries and keys, and of values


def add_providers(parser: argparse.ArgumentParser, peers: Sequence[str]) -> None:
    """--providers, by default all of these peers."""
    parser.add_argument(
        "--providers",
        nargs="+",
        choices=(OWN, *peers),
        default=(OWN, *peers),
        metavar="NAME",
        help=f"whom to measure beside {OWN}, which always is: {', '.join(peers)}; default: all",
    )


def add_files(parser: argparse.ArgumentParser, *, plot: bool = True) -> None:
    """--csv and, where there are rates against lengths, --plot."""
    parser.add_argument("--csv", type=Path, metavar="FILE", help="file to write the rows to")
    parser.set_defaults(plot=None)
    if plot:
        parser.add_argument("--plot", type=folder, metavar="FOLDER", help="folder to draw the rates into")


def add_effort(parser: argparse.ArgumentParser, *, repeats: int, seconds: float = 300) -> None:
    """--repeats and --seconds."""
    parser.add_argument("--repeats", type=positive, default=repeats, help="timed stretches (default: %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=seconds, help="no new problem after them (default: %(default)s)"
    )


def add_grid(parser: argparse.ArgumentParser, head_dim: Sequence[HeadDims]) -> None:
    """What `cuattn.bench.prefill.problems` asks for, and --sets."""
    parser.add_argument("--head-dim", type=head_dims, nargs="+", metavar="D[:DV]", default=list(head_dim))
    parser.add_argument("--length", type=positive, nargs="+", default=[512, 1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--dtype", nargs="+", choices=configs.DTYPES, default=["bfloat16"])
    parser.add_argument("--tokens", type=positive, default=16384, help="tokens in a batch (default: %(default)s)")
    parser.add_argument("--sets", type=positive, default=2, help="sets of inputs to go through (default: %(default)s)")


def chosen_peers(options: argparse.Namespace) -> list[str]:
    return [name for name in options.providers if name != OWN]


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"got {number}, expected at least 1")
    return number


def folder(text: str) -> Path:
    """A folder, there or to be made."""
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a folder")
    return path


def head_dims(text: str) -> HeadDims:
    """ "128", or "192:128" for values with a head dim of their own."""
    first, _, second = text.partition(":")
    dims = int(first), int(second or first)
    if not set(dims) <= set(configs.HEAD_DIMS):
        raise argparse.ArgumentTypeError(f"got {text}, expected multiples of 8 up to {configs.HEAD_DIMS[-1]}")
    return dims
