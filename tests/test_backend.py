"""The choice of an implementation: blocks, the environment variable, devices."""

import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import cuattn
from cuattn import backend, env
from cuattn.backend import Backend
from cuattn.interop import Device


@pytest.fixture(autouse=True)
def no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(env.BACKEND, raising=False)


def test_the_block_decides_then_the_variable_then_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert backend.active() == Backend("auto")
    monkeypatch.setenv(env.BACKEND, "emulator:sm_90a")
    assert backend.active() == Backend("emulator", "sm_90a")
    with cuattn.use_backend("reference"):
        assert backend.active() == Backend("reference")
        with cuattn.use_backend("emulator"):
            assert backend.active() == Backend("emulator", "sm_80")
        assert backend.active() == Backend("reference")
    monkeypatch.setenv(env.BACKEND, "emulator")
    assert backend.active() == Backend("emulator", "sm_80")
    monkeypatch.setenv(env.BACKEND, "")
    assert backend.active() == Backend("auto")


def test_an_error_in_the_block_ends_it() -> None:
    with pytest.raises(RuntimeError), cuattn.use_backend("emulator"):
        raise RuntimeError
    assert backend.active() == Backend("auto")


def test_other_threads_are_left_alone() -> None:
    with ThreadPoolExecutor(1) as pool, cuattn.use_backend("emulator"):
        assert pool.submit(backend.active).result() == Backend("auto")


@pytest.mark.parametrize(
    ("name", "arch", "message"),
    [
        ("gpu", None, "name: got 'gpu', expected one of 'auto', 'cuda', 'reference', 'emulator'"),
        ("reference", "sm_80", "arch: got 'sm_80', expected None for the backend 'reference'"),
        ("emulator", "sm_70", "arch: got 'sm_70', expected one of sm_80, "),
        ("emulator", "90", "arch: got '90', expected one of sm_80, "),
    ],
)
def test_bad_choices(name: str, arch: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"), cuattn.use_backend(name, arch):
        pass


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("gpu", "CUATTN_BACKEND: got 'gpu', expected one of"),
        ("emulator:sm_70", "CUATTN_BACKEND: got 'sm_70', expected one of sm_80, "),
        ("reference:sm_80", "CUATTN_BACKEND: got 'sm_80', expected None for the backend 'reference'"),
    ],
)
def test_a_bad_variable(value: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(env.BACKEND, value)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        cuattn.attention(*(np.zeros((1, 1, 1, 64), np.float16) for _ in range(3)))


def test_each_backend_takes_the_tensors_it_can() -> None:
    cpu, gpu = Device("cpu", 0), Device("cuda", 1)
    assert Backend("auto").for_device(gpu) == Backend("cuda")
    assert Backend("auto").for_device(cpu) == Backend("reference")
    for name in ("emulator", "reference"):
        with pytest.raises(ValueError, match=f"^q: got device cuda:1, expected a cpu device for the backend '{name}'"):
            Backend(name, "sm_80" if name == "emulator" else None).for_device(gpu)
    with pytest.raises(ValueError, match=r"^q: got device cpu, expected a cuda device for the backend 'cuda'"):
        Backend("cuda").for_device(cpu)
