"""Every way to ask for attention on a CUDA device: longer, against the emulator, in graphs, under load, gone wrong."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from packed import assert_both_equal, bits_of
from surface import ASKED, Call, Surface, arranged, covering, spoiled
from test_invariance_gpu import VALIDATED
from test_varlen_gpu import torch_library

import cuattn
from cuattn import env
from cuattn.devices import device_architecture
from cuattn.testing import BitwiseMismatch, TorchLibrary, assert_bitwise_equal
from cuattn.testing.bitwise import assert_same_bits

pytestmark = pytest.mark.gpu

#: (dtype, dims, mask)
KERNELS = (
    ("bfloat16", (128, 128), "causal"),
    ("float16", (64, 64), "full"),
    ("float32", (96, 96), "causal"),
    ("bfloat16", (256, 256), "causal"),
    ("float16", (192, 128), "full"),
)
KEYS = {1: (9000, 0, 513, 77), 3: (20_000, 4, 0, 640), 64: (4100, 0, 1311), 257: (2600, 0, 131)}


def sample() -> Iterator[Any]:
    heads = {"heads": ((4, 2), (8, 1), (3, 3))}
    for levels in covering(ASKED | heads | {"kernel": KERNELS}):
        dtype, dims, mask = levels.pop("kernel")
        case = arranged(**levels, lengths=KEYS, dtype=dtype, dims=dims, mask=mask)
        yield pytest.param(case, id=str(case))


def randn(*shape: int, dtype: str = "bfloat16", seed: int = 0) -> torch.Tensor:
    device = torch_library().device
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device).to(getattr(torch, dtype))


def int32(numbers: Any) -> torch.Tensor:
    return torch.as_tensor(np.asarray(numbers, np.int32), device=torch_library().device)


@pytest.mark.parametrize("case", list(sample()))
def test_each_sequence_alone(case: Surface) -> None:
    case.check(torch_library())


@pytest.mark.parametrize(
    ("way", "name"), [("mask left", "key_padding_mask"), ("append", "block_table"), ("packed cache", "block_table")]
)
def test_controls(way: str, name: str) -> None:
    library = torch_library()
    case = Surface(way, (3, 3, 3), (200, 60, 600), finite=True, page_size=16)
    case.check(library)
    results, _ = case.run(library, spoiled(name, lambda x: np.roll(x, 1, axis=1)))
    with pytest.raises(BitwiseMismatch):
        case.assert_same(results, case.alone(cuattn.attention, library))


class TestLongContexts:
    KEYS = 2**17

    @pytest.mark.parametrize(
        ("dtype", "head_dim"), [("bfloat16", 128), ("float16", 64), ("float32", 128), ("bfloat16", 256)]
    )
    def test_one_sequence(self, dtype: str, head_dim: int) -> None:
        """The last rows of a prefill, decoded with any number of splits."""
        q, k, v = (
            randn(1, h, n, head_dim, dtype=dtype, seed=h + n) for h, n in ((8, 129), (2, self.KEYS), (2, self.KEYS))
        )
        prefill = bits_of(cuattn.attention(q, k, v, "causal", return_lse=True))
        for rows in (1, 3):
            expected = tuple(x[:, :, -rows:] for x in prefill)
            for splits in (None, 1, 2, 3, 7, 64, 1000):
                result = cuattn.attention(q[:, :, -rows:], k, v, "causal", num_splits=splits, return_lse=True)
                assert_both_equal(bits_of(result), expected, dtype, f"{rows} rows, {splits} splits")
            late = cuattn.attention(q[:, :, -rows:], k[:, :, 1:], v[:, :, 1:], "causal", return_lse=True)
            with pytest.raises(BitwiseMismatch):
                assert_both_equal(bits_of(late), expected, dtype)

    @pytest.mark.parametrize(("dtype", "head_dim"), [("bfloat16", 128), ("float32", 64)])
    def test_one_long_among_63_short(self, dtype: str, head_dim: int) -> None:
        """Decode over pages in any order; entries of the table that no key needs are no pages."""
        random, size = np.random.default_rng(0), 64
        lengths = random.integers(0, 4000, 64)
        lengths[17] = 100_000
        counts = -(-lengths // size)
        table = np.full((64, counts.max()), 2**31 - 1)
        pages = np.split(random.permutation(counts.sum()), np.cumsum(counts)[:-1])
        for row, own in zip(table, pages, strict=True):
            row[: len(own)] = own
        caches = [randn(int(counts.sum()), size, 2, head_dim, dtype=dtype, seed=seed) for seed in (1, 2)]
        q = randn(64, 1, 8, head_dim, dtype=dtype)
        for splits in (None, 1, 7, 64):
            out, lse = bits_of(
                cuattn.attention_kvcache(
                    q, *caches, int32(lengths), block_table=int32(table), num_splits=splits, return_lse=True
                )
            )
            for b, (own, length) in enumerate(zip(pages, lengths, strict=True)):
                k, v = (x[int32(own).long()].flatten(0, 1)[None, :length] for x in caches)
                alone = cuattn.attention(q[b : b + 1], k, v, "causal", layout="bshd", return_lse=True)
                assert_both_equal((out[b : b + 1], lse[b : b + 1]), bits_of(alone), dtype, f"sequence {b}")
        short = cuattn.attention_kvcache(q, *caches, int32(lengths - (lengths > 99_999)), block_table=int32(table))
        with pytest.raises(BitwiseMismatch):
            assert_same_bits(bits_of((short, short))[0], out, dtype)


class TestEmulator:
    """The emulated kernels of this device's architecture give the device's bits."""

    CASES = (
        Surface("append", (1,) * 4, (1200, 1, 514, 40), "causal", "bfloat16", (128, 128), (8, 2), page_size=16),
        Surface("append", (3,) * 3, (1200, 3, 514), "causal", "float32", (128, 128), (4, 2), num_splits=3),
        Surface("mask left", (1,) * 3, (1200, 0, 514), "causal", "float16", (64, 64), (4, 1), 7),
        Surface("mask holes", (150,) * 3, (300, 0, 150), "causal", "bfloat16", (256, 256), (2, 1)),
        Surface("mask right", (70,) * 3, (300, 0, 150), "full", "float32", (64, 128), (2, 1)),
        Surface("packed", (70, 1, 0, 5), (300, 600, 3, 5), "full", "float16", (192, 128), (2, 1)),
        Surface(
            "packed append", (100, 1, 1, 5), (300, 700, 3, 5), "causal", "bfloat16", (72, 72), (3, 1), page_size=48
        ),
        Surface("packed cache", (100, 1, 1, 5), (300, 700, 3, 5), "causal", "float16", (256, 256), (2, 2), page_size=1),
        Surface("cache", (5,) * 3, (1, 2100, 0), "full", "float32", (200, 200), (4, 4), num_splits=64),
    )

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_same_bits(self, case: Surface) -> None:
        arch = device_architecture(0)
        if arch not in VALIDATED:
            pytest.skip(f"the emulator's model was compared with {', '.join(VALIDATED)}, not with {arch}")
        results, caches = case.run(torch_library())
        with cuattn.use_backend("emulator", arch):
            emulated, emulated_caches = case.run(TorchLibrary())
        case.assert_same(results, emulated)
        assert caches.keys() == emulated_caches.keys()
        for name, bits in caches.items():
            assert_same_bits(bits, emulated_caches[name], case.dtype, name)
        with pytest.raises(BitwiseMismatch):
            case.assert_same(replace(case, seed=1).run(torch_library())[0], emulated)


class TestGraphs:
    @pytest.mark.parametrize("page_size", [None, 16])
    @pytest.mark.parametrize("way", ["append", "packed append"])
    def test_decode(self, way: str, page_size: int | None) -> None:
        """Captured once, replayed with other queries, new keys, caches, lengths and pages."""
        library = torch_library()
        steps = [
            Surface(way, (1,) * 4, tuple(np.roll((5000, 1, 513, 77), turn).tolist()), dtype="bfloat16",
                    dims=(128, 128), heads=(8, 2), page_size=page_size, seed=turn)
            for turn in range(4)
        ]  # fmt: skip
        call = steps[0].call()
        static = call.arguments(library, "bfloat16")
        function = getattr(cuattn, call.function)
        function(**static, return_lse=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, lse = function(**static, return_lse=True)

        def replay(step: Surface, kept: str = "") -> None:
            new = step.call().arguments(library, "bfloat16")
            for name, tensor in static.items():
                if torch.is_tensor(tensor) and name != kept:
                    tensor.copy_(new[name])
            for result in (out, lse):
                result.fill_(torch.nan)
            graph.replay()
            step.assert_same(step.split(*bits_of((out, lse))), step.alone(cuattn.attention, library))
            step.assert_caches({name: bits_of((x, x))[0] for name, x in static.items() if name.endswith("_cache")})

        for step in steps:
            replay(step)
        for kept in ("cache_lengths", "block_table") if page_size else ("cache_lengths",):
            with pytest.raises(BitwiseMismatch):
                replay(replace(steps[1], finite=True), kept)
            replay(steps[0])


class TestUnderLoad:
    CASES = (
        Surface("append", (1,) * 4, (9000, 1, 513, 77), "causal", "bfloat16", (128, 128), (8, 2), page_size=16),
        Surface("packed append", (300, 1, 5), (2000, 5000, 5), "causal", "bfloat16", (128, 128), (8, 2), page_size=48),
        Surface("mask holes", (257,) * 3, (2000, 0, 513), "causal", "float16", (64, 64), (4, 2)),
        Surface("cache", (3,) * 3, (5000, 0, 513), "causal", "float32", (96, 96), (4, 2)),
        Surface("lengths", (257,) * 3, (2000, 0, 513), "full", "bfloat16", (256, 256), (2, 1)),
    )

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_hundred_runs(self, case: Surface) -> None:
        """A race shows as a rare difference, beside another stream's work of changing length."""
        library, side = torch_library(), torch.cuda.Stream()
        factors = [randn(256 * n, 2048, seed=n) for n in range(1, 9)]
        call = case.call()
        expected = case.alone(cuattn.attention, library)
        for run in range(100):
            arguments = call.arguments(library, case.dtype)
            torch.cuda.synchronize()
            with torch.cuda.stream(side):
                for factor in factors[run % 8 :]:
                    factor @ factor.T
            results = case.split(*call.run(arguments))
            case.assert_same(results, expected)
            caches = {name: bits_of((x, x))[0] for name, x in arguments.items() if name.endswith("_cache")}
            if caches:
                case.assert_caches(caches)


class TestWrongNumbers:
    LARGEST, SMALLEST = 2**31 - 1, -(2**31)
    GUARD = 4096  # elements
    CASE = Surface("append", (2, 2), (200, 72), page_size=16)

    @staticmethod
    def checked(call: Call) -> Call:
        return replace(call, options=call.options | {"check": True})

    def test_checked_right_ones(self) -> None:
        case, library = self.CASE, torch_library()
        results, caches = case.run(library, self.checked)
        case.assert_same(results, case.alone(cuattn.attention, library))
        case.assert_caches(caches)

    @pytest.mark.parametrize(
        ("way", "name", "wrong"),
        [
            ("append", "cache_lengths", [-1, 5]),
            ("append", "cache_lengths", [0, 10**6]),
            ("append", "block_table", np.full((2, 13), -1)),
            ("append", "block_table", np.full((2, 13), 10**6)),
            ("append", "block_table", np.zeros((2, 13))),
            ("cache", "cache_lengths", [0, LARGEST]),
            ("packed cache", "cu_seqlens_q", [0, 5, 4]),
        ],
    )
    def test_checked(self, way: str, name: str, wrong: Any) -> None:
        """Refused before anything is written."""
        library, case = torch_library(), replace(self.CASE, way=way)
        call = spoiled(name, lambda _: np.array(wrong))(self.checked(case.call()))
        arguments = call.arguments(library, case.dtype)
        with pytest.raises(ValueError, match=f"^{name}: "):
            call.run(arguments)
        for cache in ("k_cache", "v_cache"):
            assert_same_bits(bits_of((arguments[cache],) * 2)[0], call.arrays[cache], case.dtype, cache)

    @pytest.mark.parametrize(
        ("way", "name", "wrong"), [("lengths", "kv_lengths", [-1, 5]), ("packed", "cu_seqlens_k", [0, 999, 272])]
    )
    def test_checked_by_the_environment(self, way: str, name: str, wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(env.CHECK, "1")
        case = replace(self.CASE, way=way)
        case.check(torch_library())
        with pytest.raises(ValueError, match=f"^{name}: "):
            case.run(torch_library(), spoiled(name, lambda _: np.array(wrong)))

    def guarded(self, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A cache, and the memory on both sides of it."""
        buffer = randn(int(np.prod(shape)) + 2 * self.GUARD)
        return buffer, buffer[self.GUARD : -self.GUARD].view(shape)

    @pytest.mark.parametrize("paged", [False, True])
    def test_nothing_outside_of_the_cache_is_written(self, paged: bool) -> None:
        random, rows, pages = np.random.default_rng(0), 3, 6
        shape = (12, 16, 2, 64) if paged else (4, 96, 2, 64)
        buffers, caches = zip(*(self.guarded(*shape) for _ in range(2)), strict=True)
        before = [x.clone() for x in buffers]
        q, k_new, v_new = (randn(4, rows, heads, 64, seed=heads) for heads in (4, 2, 2))
        packed = [x.flatten(0, 1) for x in (q, k_new, v_new)]

        def numbers(*size: int) -> torch.Tensor:
            limit = random.choice([20, 200, -self.SMALLEST])
            return int32(random.integers(-limit, limit, size))

        for _ in range(200):
            lengths, starts, table = numbers(4), numbers(5), numbers(4, pages) if paged else None
            options = {"block_table": table}
            cuattn.append_kv(k_new, v_new, *caches, lengths, **options)
            cuattn.append_kv(*packed[1:], *caches, lengths, cu_seqlens=starts, **options)
            cuattn.attention_kvcache(q, *caches, lengths, k_new=k_new, v_new=v_new, **options)
            cuattn.attention_kvcache(
                packed[0], *caches, lengths, k_new=packed[1], v_new=packed[2], cu_seqlens_q=starts, **options
            )
        torch.cuda.synchronize()
        self.assert_guards(buffers, before)
        assert any((x != y).any() for x, y in zip(buffers, before, strict=True)), "nothing was written at all"

        # the control: a cache that reaches into the guard
        wider = [x[self.GUARD :].view(-1, 2, 64)[: shape[0] * shape[1] + 16] for x in buffers]
        end = int32([len(wider[0]) - rows])
        cuattn.append_kv(k_new[:1], v_new[:1], *(x[None] for x in wider), end)
        with pytest.raises(BitwiseMismatch):
            self.assert_guards(buffers, before)

    def assert_guards(self, buffers: Any, before: Any) -> None:
        for actual, expected in zip(buffers, before, strict=True):
            for part in (slice(self.GUARD), slice(-self.GUARD, None)):
                assert_bitwise_equal(actual[part], expected[part], "guard")
