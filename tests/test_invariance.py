"""The promise on a CPU: the sweep over the reference and the emulated kernels, random cases, other tilings."""

from itertools import product

import pytest
from backends import REFERENCE, SM_80, SM_90A, attention_on, backend_params
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cuattn import testing
from cuattn.config import few_rows, many_rows
from cuattn.reference.gold import visible_keys
from cuattn.testing import CHECKS, Case, Subject, TorchLibrary
from cuattn.testing.inputs import Inputs
from cuattn.testing.subject import Operation

VARIANTS = list(product(("float16", "bfloat16"), (64, 128), ("causal", "full")))
SWEEPS = [
    *((REFERENCE, "small", *VARIANTS[i]) for i in (0, 5)),
    *((SM_80, "tiny", *VARIANTS[i]) for i in (0, 3, 5, 6)),
    (SM_90A, "tiny", "bfloat16", 128, "causal"),
    (SM_90A, "tiny", "float32", (192, 128), "full"),
]


@pytest.mark.parametrize(
    ("backend", "size", "dtype", "head_dim", "mask"),
    SWEEPS,
    ids=["-".join(str(x) for x in (*filter(None, s[0]), *s[1:])) for s in SWEEPS],
)
def test_sweep(
    backend: tuple[str, str | None], size: str, dtype: str, head_dim: int | tuple[int, int], mask: str
) -> None:
    """Every check passes, and every check finds its negative control out."""
    attention, cases = attention_on(backend), list(testing.standard_cases(size, (dtype,), (head_dim,), (mask,)))
    trials = testing.plan_sweep(attention, cases)
    expected = {check.name for check in CHECKS} - ({"unseen keys"} if mask == "full" else set())
    assert {t.check.name for t in trials} == {t.check.name for t in trials if t.control} == expected
    failed = [r for r in testing.run_sweep(attention, trials, TorchLibrary()) if not r.passed]
    assert not failed, "\n".join(f"{r.trial.check.name} {r.trial.control=} {r.trial.case}: {r.detail}" for r in failed)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any small problem."""
    kv_heads = draw(st.integers(1, 2))
    dtype, head_dim = draw(st.sampled_from([("float16", 64), ("bfloat16", 128), ("float32", 64)]))
    return Case(
        len_q=draw(st.integers(1, 70)),
        len_k=draw(st.integers(0, 150) | st.integers(500, 530)),
        mask=draw(st.sampled_from(["full", "causal"])),
        dtype=dtype,
        head_dim=head_dim,
        batch=draw(st.integers(1, 3)),
        heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        family=draw(st.sampled_from(["normal", "peaked 8", "large mean"])),
        scale=draw(st.sampled_from([None, -0.3, 0.0, 1.0])),
        seed=draw(st.integers(0, 9)),
    )


@pytest.mark.parametrize("attention", backend_params(REFERENCE, SM_90A))
@settings(deadline=None, max_examples=25, suppress_health_check=list(HealthCheck))
@given(case=cases(), data=st.data())
def test_rows_alone(attention: Operation, case: Case, data: st.DataObject) -> None:
    """Some rows of one head of one sequence, computed with the keys they see and nothing else."""
    whole = Subject(attention, TorchLibrary(), case)
    item, head = data.draw(st.integers(0, case.batch - 1)), data.draw(st.integers(0, case.heads - 1))
    first = data.draw(st.integers(0, case.len_q - 1))
    last = data.draw(st.integers(first + 1, case.len_q))
    inputs, key_head = whole.inputs, head * case.kv_heads // case.heads
    keys = visible_keys(case.len_q, case.len_k, case.mask)[last - 1]
    alone = Inputs(
        inputs.q[item : item + 1, head : head + 1, first:last],
        inputs.k[item : item + 1, key_head : key_head + 1, :keys],
        inputs.v[item : item + 1, key_head : key_head + 1, :keys],
    )
    expected = whole.baseline[item : item + 1, head : head + 1, first:last]
    # causal rows without keys in a piece of their own: one row per key is the most that can be aligned
    if case.mask == "full" or last - first <= keys or first == 0:
        whole.run(alone).assert_equals(expected, f"rows {first} to {last} of head {head} of sequence {item}")
    one = Inputs(alone.q[:, :, -1:], alone.k, alone.v)
    for mask in ("full", "causal"):
        whole.run(one, mask=mask).assert_equals(expected[:, :, -1:], f"row {last - 1} with mask {mask}")


@pytest.mark.parametrize(
    ("arch", "other", "dtype", "head_dim", "mask"),
    [
        ("sm_80", "sm_86", "float16", 128, "causal"),
        ("sm_90a", "sm_120", "bfloat16", 128, "full"),
        ("sm_80", "sm_86", "bfloat16", 256, "full"),
        ("sm_90a", "sm_120", "float32", 256, "causal"),
    ],
)
def test_tilings(arch: str, other: str, dtype: str, head_dim: int, mask: str) -> None:
    """Architectures with one model of tensor cores, rows per block and ring depth of their own: the same bits."""
    shape = (head_dim, head_dim, mask, dtype)
    many = [many_rows(*shape, a, ragged=False, paged=False) for a in (arch, other)]
    few = [few_rows(*shape, a, paged=False) for a in (arch, other)]
    assert many[0].threads != many[1].threads
    assert few[0].ring_slots != few[1].ring_slots or few[0].slot_keys != few[1].slot_keys
    for len_q, len_k in ((150, 600), (33, 2100), (300, 90)):
        case = Case(len_q, len_k, mask, dtype, head_dim, family="peaked 8")
        mine, its = (Subject(attention_on(("emulator", a)), TorchLibrary(), case) for a in (arch, other))
        mine.baseline.assert_equals(its.baseline, f"{arch} against {other}, {case}")


def test_tensor_cores_of_two_generations_differ() -> None:
    """The negative control of the comparison of architectures."""
    case = Case(33, 600, dtype="bfloat16", head_dim=128)
    old, new = (Subject(attention_on(b), TorchLibrary(), case).baseline for b in (SM_80, SM_90A))
    with pytest.raises(testing.BitwiseMismatch):
        old.assert_equals(new, "sm_80 against sm_90a")
