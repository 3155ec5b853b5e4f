"""The argument ``out``, and the output that a call computes."""

from dataclasses import dataclass

from cuattn.checks.arrays import Named, check_place, check_written
from cuattn.interop import Tensor, import_tensor
from cuattn.problem import Problem, in_kernel_axes


@dataclass(frozen=True)
class Output:
    """What a call computes.

    first: the array whose library and device the results have. shape: of the output, in the caller's layout. inputs:
    what the output must not overlap, by name.
    """

    first: Named
    shape: tuple[int, ...]
    dtype: str
    layout: str
    lse_shape: tuple[int, ...]
    inputs: dict[str, Tensor]


def output_of(problem: Problem, key_name: str = "k", value_name: str = "v") -> Output:
    query = problem.query
    inputs = {"q": query, key_name: problem.key, value_name: problem.value}
    if problem.append is not None:
        inputs |= {"k_new": problem.append.key, "v_new": problem.append.value}
    return Output(Named("q", query), problem.out_shape, query.dtype, problem.layout, problem.lse_shape, inputs)


def check_out(out: object, output: Output) -> Tensor:
    """The caller's ``out``, in kernel axes."""
    tensor = import_tensor(out, "out")
    if tensor.shape != output.shape:
        raise ValueError(f"out: got shape {tensor.shape}, expected {output.shape}")
    if tensor.dtype != output.dtype:
        raise TypeError(f"out: got dtype {tensor.dtype}, expected {output.dtype}")
    check_place("out", tensor, output.first)
    tensor = in_kernel_axes(tensor, output.layout)
    check_written("out", tensor, output.inputs)
    return tensor
