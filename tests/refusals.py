"""What tests of refused arguments share."""

import re
from typing import Any

import numpy as np
import pytest

from cuattn import dispatch
from cuattn.interop.dlpack import DlpackFramework
from cuattn.interop.numpy_ import NumpyFramework
from cuattn.interop.torch_ import TorchFramework


def zeros(*shape: int, dtype: Any = np.float16) -> np.ndarray:
    return np.zeros(shape, dtype)


def forbid_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on the test fails if anything is allocated or launched."""

    def fail(*args: Any, **options: Any) -> None:
        pytest.fail("allocated or launched something", pytrace=False)

    for name in ("execute", "execute_backward", "execute_append", "execute_partials", "execute_combine"):
        monkeypatch.setattr(dispatch, name, fail)
    for framework in (NumpyFramework, TorchFramework, DlpackFramework):
        monkeypatch.setattr(framework, "empty", fail)


def assert_says(error: Exception, kind: type[Exception], argument: str, got: str, expected: str) -> None:
    """``argument: got <got>, expected <expected>``."""
    assert type(error) is kind
    pattern = rf"{re.escape(argument)}: got [^\n]*{re.escape(got)}, expected [^\n]*{re.escape(expected)}[^\n]*"
    assert re.fullmatch(pattern, str(error)), error


def refused(function: Any, *args: Any, **options: Any) -> Exception:
    """The exception of a call that neither allocates nor launches."""
    with pytest.MonkeyPatch.context() as patch:
        forbid_work(patch)
        with pytest.raises((ValueError, TypeError)) as caught:
            function(*args, **options)
    return caught.value


def short_id(value: Any) -> str:
    """Of a parameter: arrays by their type."""
    return value if isinstance(value, str) else type(value).__name__
