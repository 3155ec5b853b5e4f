"""The implementations that run on this machine's CPU, as operations that `cuattn.testing` takes."""

import functools
from typing import Any

import pytest

import cuattn
from cuattn.testing.subject import Operation

#: (backend, architecture)
REFERENCE, SM_80, SM_90A = ("reference", None), ("emulator", "sm_80"), ("emulator", "sm_90a")


def attention_on(backend: tuple[str, str | None]) -> Operation:
    """`cuattn.attention` on one backend, with all its keywords."""

    @functools.wraps(cuattn.attention)
    def attention(*args: Any, **options: Any) -> Any:
        with cuattn.use_backend(*backend):
            return cuattn.attention(*args, **options)

    return attention


def backend_params(*backends: tuple[str, str | None]) -> list[Any]:
    """Parameters for `parametrize`, named "reference", "emulator-sm_80" and so on."""
    return [pytest.param(attention_on(b), id="-".join(filter(None, b))) for b in backends]


on_every_backend = pytest.mark.parametrize("attention", backend_params(REFERENCE, SM_80, SM_90A))
