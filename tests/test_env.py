"""The environment variables."""

from pathlib import Path

import pytest

from cuattn import env


@pytest.mark.parametrize("read", [env.backend, env.kernel_dir, env.cache_dir, env.compiler, env.check, env.arch])
def test_empty_means_not_set(read, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in env.VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    expected = read()
    for variable in env.VARIABLES:
        monkeypatch.setenv(variable, "")
    assert read() == expected


def test_a_folder_of_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(env.KERNEL_DIR, str(tmp_path))
    with pytest.raises(ValueError, match=rf"^CUATTN_KERNEL_DIR: got '{tmp_path}', expected a folder of kernel sources"):
        env.kernel_dir()
    (tmp_path / "forward.cuh").touch()
    assert env.kernel_dir() == tmp_path.resolve()
    monkeypatch.setenv(env.KERNEL_DIR, str(tmp_path / "missing"))
    with pytest.raises(ValueError, match=r"/missing', expected a folder of kernel sources"):
        env.kernel_dir()


def test_what_is_set_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(env.CACHE_DIR, str(tmp_path))
    monkeypatch.setenv(env.COMPILER, "ccache g++")
    monkeypatch.setenv(env.CHECK, "1")
    monkeypatch.setenv(env.ARCH, "sm_90")
    assert (env.cache_dir(), env.compiler(), env.check(), env.arch()) == (tmp_path, "ccache g++", True, "sm_90")


def test_unparsed_variables_follow_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    names = (env.BACKEND, env.CHECK, env.ARCH)
    for name in names:
        monkeypatch.delenv(name, raising=False)
    assert env.unparsed() == (None, None, None)
    for i, name in enumerate(names):
        monkeypatch.setenv(name, f"value {i}")
        assert env.unparsed() == (*(b"value %d" % j for j in range(i + 1)), *(None,) * (2 - i))
    monkeypatch.setenv(env.CHECK, "")
    assert env.unparsed()[1] == b""


def test_checks_are_on_or_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(env.CHECK, "0")
    assert not env.check()
    monkeypatch.setenv(env.CHECK, "yes")
    with pytest.raises(ValueError, match=r"^CUATTN_CHECK: got 'yes', expected '0' or '1'$"):
        env.check()
