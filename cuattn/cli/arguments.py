"""Types of arguments that commands share."""

import argparse
from pathlib import Path


def output_file(path: str) -> str:
    """A file that can be written."""
    if Path(path).is_dir() or not Path(path).parent.is_dir():
        raise argparse.ArgumentTypeError(f"got {path!r}, expected a file in an existing folder")
    return path


def output_file_or_standard(path: str) -> str:
    """The same, or - for standard output."""
    return path if path == "-" else output_file(path)
