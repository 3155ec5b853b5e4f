"""What tests of commands share."""

import pytest

from cuattn.cli import main


def usage_error(*argv: str) -> None:
    """Asserts that the command exits with 2."""
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
