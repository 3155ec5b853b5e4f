"""Attention in parts: `cuattn.attention_partials` computes chunks of keys, anywhere, `cuattn.combine` merges them."""

from collections.abc import Sequence
from typing import Any

from cuattn import backend, contract, dispatch
from cuattn.checks import CombineCall, Named, Output, Partials, check_combine, check_count, check_partials
from cuattn.interop import Tensor
from cuattn.problem import caller_shape
from cuattn.results import fill


def chunk_starts(keys: int) -> list[int]:
    """Where a sequence of so many keys may be cut: the first key of each of its chunks, ascending, 0 included.

    They follow from the numerical contract alone: 0, 512, 1024, 1536, 2048, 3072, ... Raises ValueError or TypeError
    for what is no number of keys.
    """
    return [contract.chunk_start(chunk) for chunk in range(contract.chunk_count(check_count("keys", keys, 0)))]


def attention_partials(
    q: Any,
    k: Any,
    v: Any,
    mask: str | None = "full",
    *,
    first_key: int = 0,
    total_keys: int | None = None,
    scale: float | None = None,
    layout: str = "bhsd",
) -> Partials:
    """The unmerged chunks of `attention` over a part of the keys, for `combine` to merge with those of the others.

    q: as in `attention`, all rows. k, v: as in `attention`, but only the keys first_key to first_key + Lk - 1 of each
        sequence, on this device; parts may be computed on different devices, processes and machines.
    first_key: an element of `chunk_starts`, or total_keys. The part must end at such a place too.
    total_keys: keys of each whole sequence, first_key + Lk by default: "causal" is aligned to their end.
    mask, scale, layout: as in `attention`; the same for all parts.

    Returns `Partials` of float32 arrays of q's library, on its device: out (chunks, B, Hq, Lq, Dv), reference and sum
    (chunks, B, Hq, Lq), whatever the layout of q. A row that sees no key of a chunk has there the reference -FLT_MAX
    and zeros. On a GPU the work is queued on the caller's current stream without synchronising.

    Raises ValueError or TypeError for wrong arguments, before anything is launched; others as `attention`.
    """
    call = check_partials(q, k, v, mask, first_key, total_keys, scale, layout)
    query, problem = call.problem.query, call.problem
    framework = query.framework
    backend.active().for_device(query.device)
    rows = (call.end_chunk - call.first_chunk, *query.shape[:3])
    out = framework.empty((*rows, problem.value_dim), "float32", query.device, query)
    reference, total = (framework.empty(rows, "float32", query.device, query) for _ in range(2))
    if 0 not in rows:
        dispatch.execute_partials(problem, (out, reference, total), call.first_chunk, call.total_keys)
    return Partials(*(framework.export(tensor, query) for tensor in (out, reference, total)))


def combine(
    partials: Partials | Sequence[Partials],
    *,
    dtype: Any,
    layout: str = "bhsd",
    return_lse: bool = False,
    out: Any = None,
) -> Any:
    """What `attention` over all keys returns, from the `attention_partials` of its parts, bit for bit.

    partials: those of every part, in ascending order of keys, together every chunk of the sequence once, on one device;
        or one, of all keys. Contiguous float32 arrays of one library, for example gathered from other devices.
    dtype: of the output, that of q: "float16", "bfloat16" or "float32", or the library's name for it.
    layout: of the output: "bhsd" (B, Hq, Lq, Dv) or "bshd" (B, Lq, Hq, Dv).
    return_lse, out: as in `attention`.

    Returns the output in the library and on the device of the partials, or ``(output, lse)`` with the LSE float32,
    contiguous (B, Hq, Lq). A row that saw no key is +0, with the LSE -inf. On a GPU the work is queued on the caller's
    current stream without synchronising.

    Which chunks the partials hold cannot be seen in them: a missing, repeated or misplaced one is not noticed. Raises
    ValueError or TypeError for other wrong arguments, before anything is launched.
    """
    call = check_combine(partials, dtype, layout)

    def compute(result: Tensor, lse: Tensor | None) -> None:
        dispatch.execute_combine(call.parts, result, lse)

    return fill(_output_of(call, layout), compute, out, return_lse)


def _output_of(call: CombineCall, layout: str) -> Output:
    rows, columns = call.out.shape[1:4], call.out.shape[4]
    shape = caller_shape((*rows, columns), layout)
    fields = ("out", "reference", "sum")
    inputs = {
        f"partials[{i}].{name}": t for i, part in enumerate(call.parts) for name, t in zip(fields, part, strict=True)
    }
    return Output(Named("partials[0].out", call.out), shape, call.dtype, layout, rows, inputs)
