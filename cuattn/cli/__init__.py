"""The command ``cuattn``: check, info, cache, precompile."""

import argparse
import sys
from collections.abc import Sequence

from cuattn.cli import check, info, kernels
from cuattn.errors import CompileError, MissingDependencyError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 for success, 1 for failure. Wrong usage exits with 2."""
    parser = argparse.ArgumentParser(prog="cuattn", description="Batch-invariant softmax attention.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in (check, info, kernels):
        module.add_commands(commands)
    arguments = parser.parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except (CompileError, MissingDependencyError) as error:
        print(f"cuattn: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
