"""Validation: what the caller passed becomes a Problem, or an error that names the argument, what it got and expected.

Nothing is allocated or launched here. Numbers that lie on a GPU are read in checked mode alone.
"""

from cuattn.checks.arrays import LETTERS, Named, check_rank
from cuattn.checks.cache import AppendCall, check_append, check_kvcache
from cuattn.checks.dense import check_attention, check_varlen
from cuattn.checks.gradients import check_upstream, gradient_shapes
from cuattn.checks.options import check_count, check_layout, check_mask, check_optional_count, check_scale
from cuattn.checks.outputs import Output, check_out, output_of
from cuattn.checks.partials import CombineCall, Partials, PartialsCall, check_combine, check_partials

__all__ = [
    "LETTERS",
    "AppendCall",
    "CombineCall",
    "Named",
    "Output",
    "Partials",
    "PartialsCall",
    "check_append",
    "check_attention",
    "check_combine",
    "check_count",
    "check_kvcache",
    "check_layout",
    "check_mask",
    "check_optional_count",
    "check_out",
    "check_partials",
    "check_rank",
    "check_scale",
    "check_upstream",
    "check_varlen",
    "gradient_shapes",
    "output_of",
]
