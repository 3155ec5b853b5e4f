"""The arguments of `cuattn.attention_partials` and `cuattn.combine`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from cuattn import config, contract
from cuattn.checks.arrays import ALIGNMENT, LARGEST_DIM, Named, check_contiguous, check_place, check_sizes
from cuattn.checks.dense import check_attention
from cuattn.checks.options import check_choice, check_count, check_layout
from cuattn.interop import Tensor, import_tensor
from cuattn.problem import Problem


class Partials(NamedTuple):
    """Unmerged results of consecutive chunks of keys, float32 arrays of the caller's library.

    out: (chunks, B, Hq, Lq, Dv), weighted sums of values, not normalised. reference: (chunks, B, Hq, Lq), in the log2
    domain. sum: (chunks, B, Hq, Lq), of the weights 2**(score - reference). docs/numerics.md, section 3: o, r and l.
    """

    out: Any
    reference: Any
    sum: Any


@dataclass(frozen=True)
class PartialsCall:
    """A checked call of `cuattn.attention_partials`: the keys of the chunks first_chunk to end_chunk - 1."""

    problem: Problem
    first_chunk: int
    end_chunk: int
    total_keys: int


@dataclass(frozen=True)
class CombineCall:
    """A checked call of `cuattn.combine`: (out, reference, sum) of each shard."""

    parts: list[tuple[Tensor, Tensor, Tensor]]
    dtype: str

    @property
    def out(self) -> Tensor:
        return self.parts[0][0]


def check_partials(
    q: object,
    k: object,
    v: object,
    mask: str | None,
    first_key: object,
    total_keys: object,
    scale: object,
    layout: str,
) -> PartialsCall:
    """Checks the arguments of `cuattn.attention_partials`."""
    problem = check_attention(q, k, v, mask, scale, None, layout, None)
    first = check_count("first_key", first_key, 0)
    end = first + problem.key_length
    total = end if total_keys is None else check_count("total_keys", total_keys, 0)
    if not end <= total <= LARGEST_DIM:
        raise ValueError(f"total_keys: got {total}, expected a number from the end of k {end} to {LARGEST_DIM}")
    if first != total and not _starts_chunk(first):
        raise ValueError(f"first_key: got {first}, expected the start of a chunk (cuattn.chunk_starts) or {total}")
    if end != total and not _starts_chunk(end):
        raise ValueError(f"k: got keys up to {end}, expected the start of a chunk (cuattn.chunk_starts) or {total}")
    return PartialsCall(problem, contract.chunk_count(first), contract.chunk_count(end), total)


def check_combine(partials: object, dtype: object, layout: str) -> CombineCall:
    """Checks the arguments of `cuattn.combine`, all but ``out``."""
    check_layout(layout)
    # "float16", numpy.float16, numpy.dtype("float16") and torch.float16 have this in common
    name = str(getattr(dtype, "__name__", dtype)).removeprefix("torch.")
    check_choice("dtype", name, config.DTYPES)
    shards = [partials] if isinstance(partials, Partials) else partials
    if not isinstance(shards, Sequence) or not all(isinstance(shard, Partials) for shard in shards):
        raise TypeError(f"partials: got {_kind(partials)}, expected one Partials or a sequence of them")
    if not shards:
        raise ValueError("partials: got none, expected at least one Partials")
    first = Named("partials[0].out", import_tensor(shards[0].out, "partials[0].out"))
    return CombineCall([_check_part(f"partials[{i}]", shard, first) for i, shard in enumerate(shards)], name)


def _starts_chunk(key: int) -> bool:
    return contract.chunk_start(contract.chunk_count(key)) == key


def _kind(partials: object) -> str:
    if isinstance(partials, Sequence) and not isinstance(partials, str):
        return f"a sequence of {', '.join(sorted({type(item).__name__ for item in partials}))}"
    return type(partials).__name__


def _check_part(name: str, part: Partials, first: Named) -> tuple[Tensor, Tensor, Tensor]:
    """One shard's arrays: contiguous float32, of the batch, heads, rows and value columns of the first."""
    out, reference, total = (
        _check_float32(f"{name}.{field}", array, first) for field, array in zip(part._fields, part, strict=True)
    )
    if len(out.shape) != 5:
        raise ValueError(f"{name}.out: got shape {out.shape}, expected 5 dimensions (chunks, B, Hq, Lq, Dv)")
    if out.shape[1:] != first.tensor.shape[1:]:
        expected = first.tensor.shape[1:]
        raise ValueError(f"{name}.out: got (B, Hq, Lq, Dv) {out.shape[1:]}, expected {first.name}'s {expected}")
    check_sizes(f"{name}.out", out)
    if out.pointer % ALIGNMENT and 0 not in out.shape:
        got = out.pointer & -out.pointer
        raise ValueError(f"{name}.out: got memory at a multiple of {got} bytes, expected {ALIGNMENT}")
    for field, tensor in (("reference", reference), ("sum", total)):
        if tensor.shape != out.shape[:4]:
            raise ValueError(f"{name}.{field}: got shape {tensor.shape}, expected {out.shape[:4]}")
    return out, reference, total


def _check_float32(name: str, array: object, first: Named) -> Tensor:
    tensor = import_tensor(array, name)
    if tensor.dtype != "float32":
        raise TypeError(f"{name}: got dtype {tensor.dtype}, expected float32")
    check_place(name, tensor, first)
    check_contiguous(name, tensor)
    return tensor
