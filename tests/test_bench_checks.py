"""What the benchmarks of caches and padding measure is right: they accept cuattn's answers and refuse others."""

from pathlib import Path
from typing import Any

import pytest
import torch

import cuattn
from cuattn.bench import chunked, decode
from cuattn.testing import NumpyLibrary
from cuattn.testing.arrays import raw_bits

BENCH = Path(__file__).resolve().parents[1] / "bench"


def one_bit_off(function: Any, place: tuple[int, ...]) -> Any:
    """The function with another lowest bit at one place of what it returns."""

    def changed(*args: Any, **options: Any) -> Any:
        out = function(*args, **options)
        out.view(torch.int16)[place] ^= 1
        return out

    return changed


@pytest.mark.parametrize("page_size", [0, 48])
def test_decode(page_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = decode.Problem(3, 600, 4, 2, page_size)
    given = problem.inputs("cpu")
    q, k, v = decode.sequences(given, [0, 2])
    assert (q.shape, k.shape, v.shape) == ((2, 4, 1, 128), (2, 2, 600, 128), (2, 2, 600, 128))
    assert problem.cache_bytes == 3 * (k[0].nbytes + v[0].nbytes)
    assert decode.attempt(problem, [given], [])[1] is None
    right = cuattn.attention_kvcache

    def depends_on_splits(*args: Any, num_splits: int | None = None, **options: Any) -> Any:
        out = right(*args, num_splits=num_splits, **options)
        out.view(torch.int16)[0, 0, 0, 0] ^= num_splits or 0
        return out

    for wrong, reason in (
        (depends_on_splits, "num_splits=1"),
        (one_bit_off(right, (-1, 0, -1, -1)), "sequence 2 alone"),
    ):
        monkeypatch.setattr(cuattn, "attention_kvcache", wrong)
        assert reason in str(decode.attempt(problem, [given], [])[1])
    monkeypatch.setattr(cuattn, "attention_kvcache", lambda *a, **options: 1.02 * right(*a, **options))
    monkeypatch.setattr(cuattn, "attention", lambda *a, right=cuattn.attention, **options: 1.02 * right(*a, **options))
    assert "L2 error" in str(decode.attempt(problem, [given], [])[1])


def test_decode_problems() -> None:
    """The first heads come first, paged ones with them, and what does not fit is left out."""
    problems = decode.problems([1, 256], [1024, 8192], [(32, 8), (32, 32)], [16], 20e9)
    assert [p.kv_heads for p in problems] == [8] * 5 + [32] * 3
    assert [p.page_size for p in problems] == [0] * 4 + [16] + [0] * 3
    assert max(p.cache_bytes for p in problems) == 256 * 8192 * 8 * 128 * 4


def test_rows_of_decode() -> None:
    times = {"cuattn": [2.0, 1.0, 3.0], "cuattn 4 splits": [2.5], "cuattn 16 splits": [1.0], "flash": [3.0]}
    rows = decode.rows_of({"figure": "decode"}, times, dict.fromkeys(times, 8_000_000_000), {"sum": 5e9, "copy": 8e9})
    assert {key for row in rows for key in row} <= set(decode.COLUMNS)
    ours = rows[0]
    assert (ours["ms"], ours["gigabytes"], ours["gb_per_s"]) == ("2.00000", "8.0000", "4000")
    assert (ours["percent_of_sum"], ours["percent_of_copy"]) == ("80.0", "50.0")
    assert (ours["ratio_to_flash"], ours["ratio_to_best_fixed"]) == ("1.500", "0.500")
    assert "ratio_to_best_fixed" not in rows[1]


@pytest.mark.parametrize("mask", ["full", "causal"])
def test_padded(load, mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    padded = load("padded")
    batch = padded.Batch.make(padded.Problem("bfloat16", mask, 64, 3, 2, 50, 0.7), "cpu")
    assert len({int(places.sum()) for places in batch.places.values()}) == 1
    visible = {"full": torch.ones(50, 50), "causal": torch.ones(50, 50).tril()}[mask]
    for form in padded.FORMS:
        assert batch.pairs(form) == int((visible * batch.places[form][:, None]).sum()), form
    assert batch.pairs("packed") == batch.pairs("left")
    assert batch.why_refused() is None
    monkeypatch.setattr(cuattn, "attention", one_bit_off(cuattn.attention, (0, 0, -1, 0)))
    assert "packed: right" in batch.why_refused()
    times = {"packed": [1.0], **{form: [2.0] for form in padded.FORMS}}
    rows = padded.rows_of(batch.problem, times, {form: 10 if form == "packed" else 20 for form in times})
    assert {key for row in rows for key in row} <= set(padded.COLUMNS)
    assert {row["ratio_to_packed"] for row in rows} == {"1.000"}  # twice the time for twice the work


def test_chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    chunk = chunked.Chunk(70, 200, heads=4, kv_heads=2)
    sets = [chunk.inputs("cpu")]
    tried, refused = chunked.attempt(chunk, sets, ["math"])
    assert refused is None
    assert list(tried.results) == ["math"]
    monkeypatch.setattr(cuattn, "attention_kvcache", one_bit_off(cuattn.attention_kvcache, (0, 0, 0, 0)))
    assert "without a cache" in str(chunked.attempt(chunk, sets, [])[1])


def test_calls_reach_every_kernel(load, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the reference they all run; what the emulator would launch for them is every kernel that there is."""
    calls, smoke = load("calls").CALLS, load("smoke")
    launched: set[str] = set()
    monkeypatch.setattr(cuattn.emulator, "run", lambda launches: launched.update(x.config.kernel for x in launches))
    for arch in ("sm_90", "sm_90a"):
        with cuattn.use_backend("emulator", arch):
            for call in calls.values():
                call(NumpyLibrary())
    assert launched == {file.stem for file in (BENCH.parent / "kernels_cu").glob("*.cuh")}
    results = [[raw_bits(array) for array in calls["append"](NumpyLibrary())] for _ in range(2)]
    assert smoke.why_different(*results) is None
    results[0][1][0][2, -1, -1, -1] ^= 1
    assert "array 1" in smoke.why_different(*results)
