"""Tests of the promise for any attention operation: raw bits that depend on nothing they must not, and accuracy.

    from cuattn import testing

    report = testing.judge(my_attention, my_backward)
    assert report.ok, report

gives four judgments: accuracy and invariance of results and of gradients (docs/testing.md). One thing at a time:

    testing.assert_invariant(my_attention, testing.standard_cases("small"))
    for case in testing.accuracy_cases("small"):
        testing.assert_accurate(my_attention, case)

An operation is ``op(q, k, v, mask, scale=..., return_lse=True) -> (out, lse)``. With
``op = testing.with_packed(my_attention, my_attention_varlen)`` packed sequences are checked as well; `with_cache` and
`with_shards` add caches and keys in parts.

Gradients are examined in the same way:

    testing.assert_gradient_batch_invariant(my_backward, my_attention, testing.standard_cases("small"))
    for case in testing.gradient_accuracy_cases("small"):
        testing.assert_gradients_accurate(my_backward, my_attention, case)

A gradient operation is ``op(dout, q, k, v, out, lse, mask, scale=..., dlse=...) -> (dq, dk, dv)``, where out and lse
are attention's results; `with_packed_gradients` adds packed sequences.
"""

from cuattn.testing.accuracy import Accuracy, assert_accurate, measure_accuracy
from cuattn.testing.adapters import with_cache, with_packed, with_packed_gradients, with_shards
from cuattn.testing.arrays import CupyLibrary, Library, NumpyLibrary, TorchLibrary, poisoned_empty_like
from cuattn.testing.bitwise import BitwiseMismatch, assert_bitwise_equal
from cuattn.testing.cases import HEAD_DIMS, SIZES, WORKLOAD, accuracy_cases, gradient_accuracy_cases, standard_cases
from cuattn.testing.checks import CHECKS, GRADIENT_CHECKS, Check
from cuattn.testing.controls import non_invariant
from cuattn.testing.conventions import from_flash, from_sdpa, with_autograd
from cuattn.testing.gradient_accuracy import GradientAccuracy, assert_gradients_accurate, measure_gradient_accuracy
from cuattn.testing.gradient_controls import non_invariant_gradients
from cuattn.testing.gradients import GradientSubject
from cuattn.testing.inputs import FAMILIES, Case, Inputs, make_inputs
from cuattn.testing.judgments import Cases, judge
from cuattn.testing.limits import LIMITS, Limits
from cuattn.testing.report import FORWARD, JUDGMENTS, Report, Row, Verdict
from cuattn.testing.seen import Call
from cuattn.testing.subject import Subject
from cuattn.testing.sweep import (
    Trial,
    TrialResult,
    assert_gradient_batch_invariant,
    assert_invariant,
    invariance_sweep,
    plan_sweep,
    run_gradient_sweep,
    run_sweep,
)
from cuattn.testing.workload import run_workload, sha256, workload_inputs

__all__ = [
    "CHECKS",
    "FAMILIES",
    "FORWARD",
    "GRADIENT_CHECKS",
    "HEAD_DIMS",
    "JUDGMENTS",
    "LIMITS",
    "SIZES",
    "WORKLOAD",
    "Accuracy",
    "BitwiseMismatch",
    "Call",
    "Case",
    "Cases",
    "Check",
    "CupyLibrary",
    "GradientAccuracy",
    "GradientSubject",
    "Inputs",
    "Library",
    "Limits",
    "NumpyLibrary",
    "Report",
    "Row",
    "Subject",
    "TorchLibrary",
    "Trial",
    "TrialResult",
    "Verdict",
    "accuracy_cases",
    "assert_accurate",
    "assert_bitwise_equal",
    "assert_gradient_batch_invariant",
    "assert_gradients_accurate",
    "assert_invariant",
    "from_flash",
    "from_sdpa",
    "gradient_accuracy_cases",
    "invariance_sweep",
    "judge",
    "make_inputs",
    "measure_accuracy",
    "measure_gradient_accuracy",
    "non_invariant",
    "non_invariant_gradients",
    "plan_sweep",
    "poisoned_empty_like",
    "run_gradient_sweep",
    "run_sweep",
    "run_workload",
    "sha256",
    "standard_cases",
    "with_autograd",
    "with_cache",
    "with_packed",
    "with_packed_gradients",
    "with_shards",
    "workload_inputs",
]
