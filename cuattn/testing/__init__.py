"""Tests of the promise for any attention operation: raw bits that depend on nothing they must not, and accuracy.

    from cuattn import testing

    testing.assert_invariant(my_attention, testing.standard_cases("small"))
    for case in testing.accuracy_cases("small"):
        testing.assert_accurate(my_attention, case)

An operation is ``op(q, k, v, mask, scale=..., return_lse=True) -> (out, lse)``. With
``op = testing.with_packed(my_attention, my_attention_varlen)`` packed sequences are checked as well; `with_cache` and
`with_shards` add caches and keys in parts.
"""

from cuattn.testing.accuracy import Accuracy, assert_accurate, measure_accuracy
from cuattn.testing.adapters import with_cache, with_packed, with_shards
from cuattn.testing.arrays import CupyLibrary, Library, NumpyLibrary, TorchLibrary, poisoned_empty_like
from cuattn.testing.bitwise import BitwiseMismatch, assert_bitwise_equal
from cuattn.testing.cases import HEAD_DIMS, SIZES, WORKLOAD, accuracy_cases, standard_cases
from cuattn.testing.checks import CHECKS, Check
from cuattn.testing.controls import Call, non_invariant
from cuattn.testing.inputs import FAMILIES, Case, Inputs, make_inputs
from cuattn.testing.subject import Subject
from cuattn.testing.sweep import Trial, TrialResult, assert_invariant, invariance_sweep, plan_sweep, run_sweep

__all__ = [
    "CHECKS",
    "FAMILIES",
    "HEAD_DIMS",
    "SIZES",
    "WORKLOAD",
    "Accuracy",
    "BitwiseMismatch",
    "Call",
    "Case",
    "Check",
    "CupyLibrary",
    "Inputs",
    "Library",
    "NumpyLibrary",
    "Subject",
    "TorchLibrary",
    "Trial",
    "TrialResult",
    "accuracy_cases",
    "assert_accurate",
    "assert_bitwise_equal",
    "assert_invariant",
    "invariance_sweep",
    "make_inputs",
    "measure_accuracy",
    "non_invariant",
    "plan_sweep",
    "poisoned_empty_like",
    "run_sweep",
    "standard_cases",
    "with_cache",
    "with_packed",
    "with_shards",
]
