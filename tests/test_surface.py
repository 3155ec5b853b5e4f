"""Every way to ask for attention has the bits of each sequence alone: a sample in which any two features meet."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from backends import REFERENCE, SM_80, SM_86, SM_90A
from packed import Both, assert_both_equal, bits_of
from problems import normal
from surface import ASKED, Prompt, Sequence, Spoil, Surface, arranged, covering, fed, spoiled

import cuattn
from cuattn.testing import BitwiseMismatch, TorchLibrary, controls
from cuattn.testing.arrays import Bits, int32_array, values_of

Backend = tuple[str, str | None]
TORCH = TorchLibrary()
DTYPES = ("float16", "bfloat16", "float32")
DIMS = (*((d, d) for d in (8, 40, 64, 72, 96, 128, 136, 192, 200, 256)), (192, 128), (64, 128))
#: Compiling an emulated kernel takes longer than running it: (backend, dtype, dims, mask).
EMULATED = (
    (SM_80, "float16", (64, 64), "causal"),
    (SM_80, "float32", (96, 96), "full"),
    (SM_80, "bfloat16", (256, 256), "causal"),
    (SM_86, "bfloat16", (72, 72), "full"),
    (SM_90A, "float16", (192, 128), "full"),
)
#: Keys of the sequences, by the rows of the longest: fewer chunks where there are more rows.
KEYS = {1: (2100, 0, 513, 77), 3: (1100, 4, 0, 640), 64: (530, 0, 131), 257: (300, 0, 9)}


def sample() -> Iterator[Any]:
    heads = ((2, 1), (2, 2), (3, 1))
    variants = {"dtype": DTYPES, "dims": DIMS, "mask": ("causal", "full"), "heads": heads}
    cases = [(REFERENCE, arranged(**levels, lengths=KEYS)) for levels in covering(ASKED | variants)]
    for levels in covering(ASKED | {"num_splits": (1, 3, 64, None), "kernel": EMULATED}):
        backend, dtype, dims, mask = levels.pop("kernel")
        cases.append((backend, arranged(**levels, lengths=KEYS, dtype=dtype, dims=dims, mask=mask)))
    for backend, case in cases:
        yield pytest.param(backend, case, id=f"{'-'.join(filter(None, backend))} {case}")


@pytest.mark.parametrize(("backend", "case"), list(sample()))
def test_each_sequence_alone(backend: Backend, case: Surface) -> None:
    with cuattn.use_backend(*backend):
        case.check(TORCH)


def reversed_tokens(x: Bits) -> Bits:
    return x[:, ::-1]


def less_one(numbers: np.ndarray) -> np.ndarray:
    """The first number of sequences, or the first boundary between two, one less."""
    return numbers - (np.arange(len(numbers)) == (numbers[0] == 0))


def turned_pages(table: np.ndarray) -> np.ndarray:
    return np.roll(table, 1, axis=1)


class TestControls:
    """What the comparison above must find."""

    SPOILS = (
        *((way, "key_padding_mask", lambda x: np.roll(x, 1)) for way in ("mask right", "mask left", "mask holes")),
        ("mask nothing", "key_padding_mask", lambda x: x & (np.arange(x.shape[1]) != 5)),
        ("mask all", "key_padding_mask", lambda x: x | (np.arange(x.shape[1]) == 5)),
        ("lengths", "kv_lengths", less_one),
        ("packed", "cu_seqlens_q", less_one),
        ("packed", "cu_seqlens_k", less_one),
        ("cache", "cache_lengths", less_one),
        ("cache", "block_table", turned_pages),
        ("append", "cache_lengths", less_one),
        ("append", "k_new", reversed_tokens),
        ("append", "v_new", reversed_tokens),
        ("packed cache", "cu_seqlens_q", less_one),
        ("packed append", "cu_seqlens_q", less_one),
        ("packed append", "block_table", turned_pages),
    )

    @staticmethod
    def case(way: str) -> Surface:
        rows = (3, 2, 70) if way.startswith("packed") else (3, 3, 3)
        return Surface(way, rows, (200, 60, 130), finite=True, page_size=16, num_splits=2)

    @pytest.mark.parametrize(("way", "name", "change"), SPOILS, ids=[f"{way}-{name}" for way, name, _ in SPOILS])
    def test_one_number_wrong(self, way: str, name: str, change: Any) -> None:
        case = self.case(way)
        case.check(TORCH)
        spoil: Spoil = spoiled(name, change)
        results, caches = case.run(TORCH, spoil)
        with pytest.raises(BitwiseMismatch):
            case.assert_same(results, case.alone(cuattn.attention, TORCH))
        if "append" in way:
            with pytest.raises(BitwiseMismatch):
                case.assert_caches(caches)

    @pytest.mark.parametrize(
        ("way", "seen"),
        [
            ("mask right", lambda case, number: case.capacity - case.keys[number]),
            ("mask left", lambda case, number: int(case.places[number][0])),
            ("mask holes", lambda case, number: int(case.places[number][-1])),
            ("lengths", lambda case, number: case.capacity),
            ("packed", lambda case, number: sum(case.keys[:number])),
            ("cache", lambda case, number: int(case.table[number, 0])),
            ("append", lambda case, number: case.num_splits),
            ("packed cache", lambda case, number: number),
            ("packed append", lambda case, number: case.page_size),
        ],
    )
    def test_chunks_that_move(self, way: str, seen: Any) -> None:
        """Right within rounding, but where the keys are cut depends on what must not be seen."""
        case = self.case(way)
        results, _ = case.run(TORCH)
        bad = [
            s.alone(
                controls.non_invariant(cuattn.attention, lambda _, n=n: seen(case, n)), TORCH, case.dtype, case.mask
            )
            for n, s in enumerate(case.sequences)
        ]
        for (out, _), (close, _) in zip(bad, results, strict=True):
            np.testing.assert_allclose(values_of(out, case.dtype), values_of(close, case.dtype), atol=0.01)
        with pytest.raises(BitwiseMismatch):
            case.assert_same(bad, results)


class TestThroughACache:
    """However tokens come, the rows are those of one causal prefill of each prompt."""

    SCHEDULES = (
        pytest.param([(7,) * 3, (7,) * 3, (5,) * 3], id="7+7+5"),
        pytest.param([(1,) * 3] * 19, id="one by one"),
        pytest.param([(16, 0, 0), (1, 16, 0), (1, 1, 16), (1, 1, 1), (0, 1, 1), (0, 0, 1)], id="prefill and decode"),
        pytest.param([(13, 13, 13), (3, 3, 3), (3, 3, 3)], id="verify 3"),
        pytest.param([(0, 3, 19), (19, 0, 0), (0, 16, 0)], id="out of order"),
    )

    @pytest.mark.parametrize("page_size", [None, 1, 16])
    @pytest.mark.parametrize("schedule", SCHEDULES)
    @pytest.mark.parametrize("backend", [REFERENCE, SM_80], ids=str)
    def test_any_schedule(self, backend: Backend, schedule: list[tuple[int, ...]], page_size: int | None) -> None:
        prompts = [self.prompt(seed) for seed in range(3)]
        with cuattn.use_backend(*backend):
            results = fed(prompts, schedule, TORCH, "float16", page_size)
            for prompt, result in zip(prompts, results, strict=True):
                assert_both_equal(result, self.prefill(prompt), "float16")

    def test_control(self) -> None:
        """Lengths one too small after the first step."""
        prompts = [self.prompt(0)]
        (result,) = fed(prompts, [(7,), (7,), (5,)], TORCH, "float16", wrong=1)
        with pytest.raises(BitwiseMismatch):
            assert_both_equal(result, self.prefill(prompts[0]), "float16")

    @pytest.mark.parametrize("backend", [REFERENCE, SM_80], ids=str)
    def test_shared_pages(self, backend: Backend) -> None:
        """Two sequences with the same beginning read the pages that hold it."""
        q, k, v = self.prompt(0, 48)
        arrays = [TORCH.array(np.stack([q, q]), "float16")]
        arrays += [TORCH.array(x.reshape(2, 3, 16, -1).swapaxes(0, 1), "float16") for x in (k, v)]
        with cuattn.use_backend(*backend):
            results = {}
            for second in (1, 2):
                table = int32_array(TORCH, np.array([[0, 1, 2], [0, second, 1]]))
                lengths = int32_array(TORCH, (48, 30))
                results[second] = bits_of(
                    cuattn.attention_kvcache(
                        *arrays, lengths, block_table=table, layout="bhsd", mask="full", return_lse=True
                    )
                )
            for b, length in enumerate((48, 30)):
                expected = Sequence(q, k, v, [length] * 48).alone(cuattn.attention, TORCH, "float16", "full")
                assert_both_equal((results[1][0][b], results[1][1][b]), expected, "float16")
        with pytest.raises(BitwiseMismatch):
            assert_both_equal(results[2], results[1], "float16")

    @staticmethod
    def prompt(seed: int, tokens: int = 19) -> Prompt:
        q, k, v = (normal((heads, tokens, 64), seed=3 * seed + i) for i, heads in enumerate((4, 2, 2)))
        return q, k, v

    @staticmethod
    def prefill(prompt: Prompt) -> Both:
        out, lse = bits_of(
            cuattn.attention(*(TORCH.array(x[None], "float16") for x in prompt), "causal", return_lse=True)
        )
        return out[0], lse[0]


class TestPartials:
    """Shards of the keys, merged, have the bits of the whole."""

    KEYS = 2600
    #: Every single boundary, all of them, and uneven shards.
    CUTS = ((512,), (1024,), (1536,), (2048,), (512, 1024, 1536, 2048), (512, 2048), (0, 1536, 2600), ())

    def arrays(self, dtype: str, dims: tuple[int, int], rows: int, heads: int) -> list[Any]:
        shapes = (2, heads, rows, dims[0]), (2, 2, self.KEYS, dims[0]), (2, 2, self.KEYS, dims[1])
        return [TORCH.array(normal(shape, dtype, i), dtype) for i, shape in enumerate(shapes)]

    def merged(self, arrays: list[Any], cuts: tuple[int, ...], mask: str) -> Both:
        q, k, v = arrays
        shards = [
            cuattn.attention_partials(
                q, k[:, :, first:end], v[:, :, first:end], mask, first_key=first, total_keys=self.KEYS
            )
            for first, end in pairwise((0, *cuts, self.KEYS))
        ]
        return bits_of(cuattn.combine(shards, dtype=q.dtype, return_lse=True))

    @pytest.mark.parametrize(
        ("backend", "dtype", "dims", "mask", "rows", "heads"),
        [
            (REFERENCE, "float16", (64, 64), "causal", 3, 4),
            (REFERENCE, "bfloat16", (192, 128), "full", 20, 2),
            (REFERENCE, "float32", (40, 40), "causal", 1, 6),
            (SM_80, "float16", (64, 64), "causal", 1, 6),
            (SM_80, "float16", (64, 64), "causal", 20, 4),
            (SM_80, "bfloat16", (256, 256), "causal", 3, 4),
            (SM_80, "float32", (96, 96), "full", 3, 2),
        ],
    )
    def test_every_cut(
        self, backend: Backend, dtype: str, dims: tuple[int, int], mask: str, rows: int, heads: int
    ) -> None:
        assert cuattn.chunk_starts(self.KEYS) == [0, *self.CUTS[4]]
        arrays = self.arrays(dtype, dims, rows, heads)
        with cuattn.use_backend(*backend):
            whole = bits_of(cuattn.attention(*arrays, mask, return_lse=True))
            for cuts in self.CUTS:
                assert_both_equal(self.merged(arrays, cuts, mask), whole, dtype, str(cuts))

    def test_controls(self) -> None:
        """Shards out of order, and a diagonal that ends elsewhere."""
        arrays = self.arrays("float16", (64, 64), 3, 4)
        whole = bits_of(cuattn.attention(*arrays, "causal", return_lse=True))
        q, k, v = arrays
        parts = [
            cuattn.attention_partials(q, k[:, :, keys], v[:, :, keys], first_key=keys.start, total_keys=self.KEYS)
            for keys in (slice(0, 1536), slice(1536, self.KEYS))
        ]
        right, wrong = (bits_of(cuattn.combine(x, dtype="float16", return_lse=True)) for x in (parts, parts[::-1]))
        assert_both_equal(right, bits_of(cuattn.attention(*arrays, return_lse=True)), "float16")
        with pytest.raises(BitwiseMismatch):
            assert_both_equal(wrong, right, "float16")
        short = [x[:, :, :2048] for x in arrays]
        parts = [cuattn.attention_partials(*short, "causal", total_keys=self.KEYS)]
        with pytest.raises(BitwiseMismatch):
            assert_both_equal(bits_of(cuattn.combine(parts, dtype="float16", return_lse=True)), whole, "float16")
