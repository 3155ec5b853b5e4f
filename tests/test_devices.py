"""Compilation targets of devices: their own, and those that the environment puts in their place."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest

from cuattn import devices, env
from cuattn.config import ARCHITECTURES, OWN_ARCHITECTURES, architecture_of, capability

CAPABILITIES = ("80", "86", "87", "89", "90", "100", "103", "110", "120", "121")


@pytest.fixture
def having(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Makes cuda:0 a device of a compute capability."""

    def set_capability(compute_capability: str) -> None:
        device = SimpleNamespace(compute_capability=compute_capability)
        cupy = SimpleNamespace(cuda=SimpleNamespace(Device=lambda index: device))
        monkeypatch.setattr(devices, "import_cupy", lambda: cupy)
        devices._own_architecture.cache_clear()

    monkeypatch.delenv(env.ARCH, raising=False)
    yield set_capability
    devices._own_architecture.cache_clear()


def test_every_compute_capability_has_one_target_of_its_own() -> None:
    assert tuple(str(capability(arch)) for arch in OWN_ARCHITECTURES) == CAPABILITIES
    assert [architecture_of(number) for number in CAPABILITIES] == list(OWN_ARCHITECTURES)
    assert architecture_of("90") == "sm_90a"
    assert set(ARCHITECTURES) - set(OWN_ARCHITECTURES) == {"sm_90"}
    with pytest.raises(NotImplementedError, match="device: got compute capability 75, expected one of sm_80, "):
        architecture_of("75")


def test_the_variable_is_read_at_each_use(having: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    having("90")
    assert devices.device_architecture(0) == "sm_90a"
    for named in ("sm_90", "sm_90a"):
        monkeypatch.setenv(env.ARCH, named)
        assert devices.device_architecture(0) == named
    monkeypatch.setenv(env.ARCH, "")
    assert devices.device_architecture(0) == "sm_90a"


@pytest.mark.parametrize(
    ("compute_capability", "named", "expected"),
    [
        ("90", "sm_80", "sm_90 or sm_90a"),
        ("90", "90", "sm_90 or sm_90a"),
        ("90", "sm_99", "sm_90 or sm_90a"),
        ("80", "sm_90", "sm_80"),
        ("100", "sm_100", "sm_100a"),
    ],
)
def test_targets_of_other_devices_are_refused(
    having: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, compute_capability: str, named: str, expected: str
) -> None:
    having(compute_capability)
    monkeypatch.setenv(env.ARCH, named)
    with pytest.raises(ValueError, match=f"^CUATTN_ARCH: got '{named}', expected {expected} for the device cuda:0$"):
        devices.device_architecture(0)
