"""Random ways to ask for attention over random sequences: each has the bits of its sequence alone."""

from typing import Any

from backends import REFERENCE, SM_80
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st
from surface import CACHED, WAYS, Surface

import cuattn
from cuattn.config import HEAD_DIMS
from cuattn.testing import BitwiseMismatch, TorchLibrary, controls

TORCH = TorchLibrary()
#: Both sides of the edges of groups, tiles and chunks.
EDGES = st.sampled_from([0, 1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 511, 512, 513])
#: (dtype, dims, mask) of which `test_surface` compiles the emulated kernels too.
EMULATED = (("float16", (64, 64), "causal"), ("float32", (96, 96), "full"), ("bfloat16", (256, 256), "causal"))
unhurried = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


@st.composite
def kernels(draw: st.DrawFn) -> tuple[str, tuple[int, int], str]:
    dims = draw(st.tuples(*[st.sampled_from(HEAD_DIMS)] * 2) | st.sampled_from(HEAD_DIMS).map(lambda d: (d, d)))
    return draw(st.sampled_from(["float16", "bfloat16", "float32"])), dims, draw(st.sampled_from(["causal", "full"]))


@st.composite
def surfaces(draw: st.DrawFn, kernels: st.SearchStrategy[Any], most_rows: int, ways: tuple[str, ...] = WAYS) -> Surface:
    way = draw(st.sampled_from(ways))
    count = draw(st.integers(1, 4))
    row_count = st.sampled_from([1, 2, 3]) | st.integers(0, most_rows)
    if way.startswith("packed"):
        rows = draw(st.lists(row_count, min_size=count, max_size=count))
    else:
        rows = [draw(row_count)] * count
    keys = draw(st.lists(EDGES | st.integers(0, 700), min_size=count, max_size=count))
    if "append" in way:
        keys = [n + new for n, new in zip(keys, rows, strict=True)]
    dtype, dims, mask = draw(kernels)
    return Surface(
        way,
        tuple(rows),
        tuple(keys),
        mask,
        dtype,
        dims,
        heads=draw(st.sampled_from([(1, 1), (2, 1), (2, 2), (3, 1), (4, 2)])),
        num_splits=draw(st.none() | st.integers(1, 70)),
        page_size=draw(st.none() | st.sampled_from([1, 16, 64]) | st.integers(1, 300)) if way in CACHED else None,
        layout=draw(st.sampled_from(["bshd", "bhsd"])),
    )


@settings(max_examples=60, **unhurried)
@given(case=surfaces(kernels(), most_rows=140))
def test_reference(case: Surface) -> None:
    with cuattn.use_backend(*REFERENCE):
        case.check(TORCH)


@settings(max_examples=10, **unhurried)
@given(case=surfaces(st.sampled_from(EMULATED), most_rows=20))
def test_emulator(case: Surface) -> None:
    with cuattn.use_backend(*SM_80):
        case.check(TORCH)


def test_control() -> None:
    """Operations whose chunks move with the place in the batch are found out."""

    def is_found_out(case: Surface) -> bool:
        bad = [
            s.alone(controls.non_invariant(cuattn.attention, lambda _, n=n: n), TORCH, case.dtype, case.mask)
            for n, s in enumerate(case.sequences)
        ]
        results, _ = case.run(TORCH)
        try:
            case.assert_same(bad, results)
        except BitwiseMismatch:
            return True
        return False

    any_example = settings(max_examples=50, phases=[Phase.generate], **unhurried)
    for way in WAYS:
        if way != "mask all":  # rows without keys have nothing that could be cut
            find(surfaces(kernels(), 5, (way,)), is_found_out, settings=any_example)
