"""The kernels around attention, emulated, against NumPy: appending to a cache, and the tables of a padding mask."""

import numpy as np
import pytest
from small_kernels import cache, expected_scan, random_mask, scan

from cuattn import emulator, env
from cuattn.config import AppendConfig, KernelConfig, ScanConfig
from cuattn.errors import EmulatorError
from cuattn.jit.compiler import compile_cubin
from cuattn.jit.unit import kernel_source


class TestScan:
    @pytest.mark.parametrize("length", [0, 1, 31, 33, 1000, 5000])
    def test_any_length(self, length: int) -> None:
        mask = random_mask(length)
        for got, expected in zip(scan(mask), expected_scan(mask), strict=True):
            np.testing.assert_array_equal(got, expected)

    @pytest.mark.parametrize("valid", [False, True])
    @pytest.mark.parametrize("length", [33, 4096])
    def test_one_value(self, length: int, valid: bool) -> None:
        mask = np.full((2, length), valid)
        positions, seen = scan(mask)
        assert (positions == (np.arange(length) if valid else 0)).all()
        assert (seen == [*np.arange(length + 1) * valid, 0]).all()

    @pytest.mark.parametrize(("first", "end"), [(0, 7), (3, 3), (5, 70), (60, 90), (89, 90)])
    def test_keys_in_one_piece(self, first: int, end: int) -> None:
        mask = np.zeros((2, 90), bool)
        mask[:, first:end] = True
        mask[1, [0, 88]] = True  # two pieces, unless they touch
        got = scan(mask)
        for x, expected in zip(got, expected_scan(mask), strict=True):
            np.testing.assert_array_equal(x, expected)
        assert got[1][0, -1] == (first if end > first else 0)
        assert got[1][1, -1] == -1

    def test_strides(self) -> None:
        mask = random_mask(300)
        expected = expected_scan(mask)
        spread, turned = np.ones((2, 3, 300, 2), bool), np.ones((300, 2), bool)
        spread[:, 1, :, 1], turned[...] = mask, mask.T
        reverse = np.ascontiguousarray(mask[::-1, ::-1])[::-1, ::-1]
        for same in (spread[:, 1, :, 1], turned.T, reverse):
            assert same.strides != mask.strides
            for got, wanted in zip(scan(same), expected, strict=True):
                np.testing.assert_array_equal(got, wanted)
        repeated = np.broadcast_to(mask[:1], (3, 300))
        np.testing.assert_array_equal(scan(repeated)[1], expected[1][[0, 0, 0]])

    @pytest.mark.parametrize("schedule", emulator.SCHEDULES)
    def test_any_order(self, schedule: str) -> None:
        mask = random_mask(9000, batch=1)
        np.testing.assert_array_equal(scan(mask, schedule)[1], expected_scan(mask)[1])


PAGE_SIZES = [None, 1, 16, 48]


@pytest.mark.parametrize("page_size", PAGE_SIZES)
class TestAppend:
    def test_one_token_each(self, page_size: int | None) -> None:
        cache([0, 7, 99, 15, 16, 47, 48], 1, page_size=page_size).check()

    def test_several_tokens(self, page_size: int | None) -> None:
        cache([0, 40, 88], 12, page_size=page_size).check()

    def test_packed(self, page_size: int | None) -> None:
        """Sequences without tokens at both ends and in between, and more of them than a warp has lanes."""
        cache([3, 0, 5, 5, 9, 2], 15, page_size=page_size, starts=[0, 0, 4, 4, 5, 15, 15]).check()
        starts = np.cumsum([0, *(s % 3 for s in range(70))]).tolist()
        cache([s % 5 for s in range(70)], starts[-1], 8, 1, page_size=page_size, starts=starts).check()

    @pytest.mark.parametrize("starts", [None, [0, 5, 10, 15]])
    def test_beyond_the_capacity(self, page_size: int | None, starts: list[int] | None) -> None:
        made = cache([0, 0, 2**31 - 1], 15 if starts else 5, page_size=page_size, starts=starts)
        made.lengths[:2] = [made.capacity - 2, made.capacity]
        made.check()

    def test_wrong_lengths(self, page_size: int | None) -> None:
        cache([-1, 3, -(2**31)], 4, page_size=page_size).check()

    def test_any_number_of_blocks_and_any_order(self, page_size: int | None) -> None:
        for schedule, processors in (("descending", 1), ("random", 1), ("ascending", 100)):
            cache([0, 40, 88], 12, page_size=page_size).check(schedule, processors)

    def test_strides(self, page_size: int | None) -> None:
        """Caches and new tokens with heads behind tokens, keys and values in one array, and gaps."""
        made = cache([0, 40, 88], 12, page_size=page_size, dims=(32, 32))
        places, heads, tokens, _ = made.key.shape
        both = np.full((places, 3, tokens, heads, 32), 0xFFFF, np.uint16)
        made.key, made.value = both[:, 0].swapaxes(1, 2), both[:, 2].swapaxes(1, 2)
        wide = np.zeros((3, 12, heads, 48), np.uint16).swapaxes(1, 2)
        wide[..., 8:40] = made.new_key
        made.new_key = wide[..., 8:40]
        made.check()
        assert (both[:, 1] == 0xFFFF).all()


@pytest.mark.parametrize(
    ("dtype", "dims"), [(np.uint16, (8, 256)), (np.uint16, (256, 8)), (np.uint32, (256, 256)), (np.uint32, (8, 16))]
)
def test_append_any_width(dtype: type, dims: tuple[int, int]) -> None:
    for page_size in (None, 16):
        cache([0, 7], 3, page_size=page_size, dims=dims, heads=3, dtype=dtype).check()


def test_append_to_wrong_pages() -> None:
    """Nothing of a token whose page does not exist is written; others are."""
    made = cache([10, 10, 10], 12, page_size=16)
    assert made.table is not None
    made.table[0, 0], made.table[1, 1], made.table[2, 0] = -1, len(made.key), -(2**31)
    made.check()


def test_append_of_tokens_of_no_sequence() -> None:
    """What wrong cumulative lengths leave out is not written, and nothing outside of the arrays is touched."""
    made = cache([0, 3], 9, starts=[2, 5, 7])
    made.check()
    for wrong in ([0, 50, 9], [-5, 5, 9], [9, 5, 0], [50, 60, 70], [-9, -8, -7], [2**31 - 1, -(2**31), 0]):
        made = cache([0, 3], 9, starts=wrong)
        made.append()
        known = {row.tobytes() for row in made.new_key[0].swapaxes(0, 1)} | {b"\xff" * (2 * 2 * 64)}
        assert {row.tobytes() for rows in made.key for row in rows.swapaxes(0, 1)} <= known


def test_append_finds_two_sequences_in_one_page() -> None:
    """Negative control: the emulator sees a place of the cache that two tokens are written to."""
    cache([3, 3], 2, page_size=16).append()
    made = cache([3, 3], 2, page_size=16)
    assert made.table is not None
    made.table[1] = made.table[0]
    with pytest.raises(EmulatorError, match=r"[kv]_cache has been written there before"):
        made.append()


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90a", "sm_100a", "sm_120"])
@pytest.mark.parametrize("kind", [AppendConfig, ScanConfig])
def test_nothing_spills(kind: type[KernelConfig], arch: str) -> None:
    config = kind(arch)
    cubin, used = compile_cubin(config, kernel_source(config), env.kernel_dir())
    assert cubin
    assert not used.spills
    assert used.registers * config.threads <= 64 * 1024
