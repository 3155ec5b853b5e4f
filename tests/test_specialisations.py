"""Every specialisation of the real kernels compiles for every family of devices and keeps its data in registers."""

import pytest

from cuattn import jit

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120")


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_nothing_spills(arch: str) -> None:
    used = {kernel.config.name: jit.resources(kernel.config) for kernel in jit.precompile(archs=[arch])}
    assert used
    assert {name: resources for name, resources in used.items() if resources.spills} == {}
