"""The command ``cuattn``: check, info, workload, bench, cache, precompile."""

import argparse
import sys
from collections.abc import Sequence

from cuattn import backend as backends
from cuattn import env
from cuattn.cli import bench, check, info, kernels, workload
from cuattn.errors import CompileError, MissingDependencyError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 for success, 1 for failure. Wrong usage and wrong
    environment variables exit with 2."""
    parser = argparse.ArgumentParser(prog="cuattn", description="Batch-invariant softmax attention.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in (check, info, workload, bench, kernels):
        module.add_commands(commands)
    arguments = parser.parse_args(argv)
    try:
        backends.active()
        env.kernel_dir()
    except ValueError as error:
        parser.error(str(error))
    try:
        return int(arguments.run(arguments))
    except (CompileError, MissingDependencyError, OSError) as error:
        print(f"cuattn: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
