"""The implementations that run on this machine's CPU, as operations that `cuattn.testing` takes."""

import functools
from collections.abc import Callable
from typing import Any

import pytest

import cuattn
from cuattn.testing.subject import Operation

#: (backend, architecture)
REFERENCE, SM_80, SM_86, SM_90A = (
    ("reference", None),
    ("emulator", "sm_80"),
    ("emulator", "sm_86"),
    ("emulator", "sm_90a"),
)


def on_backend(function: Callable[..., Any], backend: tuple[str, str | None]) -> Callable[..., Any]:
    """A function of cuattn that runs on one backend, with all its keywords."""

    @functools.wraps(function)
    def on_it(*args: Any, **options: Any) -> Any:
        with cuattn.use_backend(*backend):
            return function(*args, **options)

    return on_it


def attention_on(backend: tuple[str, str | None]) -> Operation:
    """All ways to ask cuattn for attention, with the keywords of `cuattn.testing`, on one backend."""
    dense, varlen, kvcache, partials, combine = (
        on_backend(function, backend)
        for function in (
            cuattn.attention,
            cuattn.attention_varlen,
            cuattn.attention_kvcache,
            cuattn.attention_partials,
            cuattn.combine,
        )
    )
    attention = cuattn.testing.with_cache(cuattn.testing.with_packed(dense, varlen), kvcache)
    return cuattn.testing.with_shards(attention, partials, combine, cuattn.chunk_starts)


def gradients_on(backend: tuple[str, str | None]) -> Operation:
    """All ways to ask cuattn for gradients, on one backend."""
    dense, varlen = (on_backend(f, backend) for f in (cuattn.attention_backward, cuattn.attention_varlen_backward))
    return cuattn.testing.with_packed_gradients(dense, varlen)


def backend_params(*backends: tuple[str, str | None]) -> list[Any]:
    """Parameters for `parametrize`, named "reference", "emulator-sm_80" and so on."""
    return [pytest.param(attention_on(b), id="-".join(filter(None, b))) for b in backends]


on_every_backend = pytest.mark.parametrize("attention", backend_params(REFERENCE, SM_80, SM_90A))
