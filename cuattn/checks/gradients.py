"""The arguments of `cuattn.attention_backward` and `cuattn.attention_varlen_backward` that attention does not have."""

from cuattn.checks.arrays import LETTERS, Named, check_contiguous, check_memory, check_place, import_array
from cuattn.interop import Tensor, import_tensor
from cuattn.problem import Problem, Upstream, caller_shape, in_kernel_axes


def check_upstream(problem: Problem, dout: object, out: object, lse: object, dlse: object) -> Upstream:
    """What attention returned for ``problem``, and the gradients of it."""
    first = Named("q", problem.query)

    def like_out(name: str, array: object) -> Tensor:
        tensor = import_array(name, array, LETTERS[problem.layout], first)
        if tensor.shape != problem.out_shape:
            raise ValueError(f"{name}: got shape {tensor.shape}, expected {problem.out_shape}")
        tensor = in_kernel_axes(tensor, problem.layout)
        check_memory(name, tensor)
        return tensor

    def like_lse(name: str, array: object) -> Tensor:
        tensor = import_tensor(array, name)
        if tensor.dtype != "float32":
            raise TypeError(f"{name}: got dtype {tensor.dtype}, expected float32")
        check_place(name, tensor, first)
        if tensor.shape != problem.lse_shape:
            raise ValueError(f"{name}: got shape {tensor.shape}, expected {problem.lse_shape}")
        check_contiguous(name, tensor)
        return tensor

    gradient = like_out("dout", dout)
    return Upstream(
        like_out("out", out), like_lse("lse", lse), gradient, None if dlse is None else like_lse("dlse", dlse)
    )


def gradient_shapes(problem: Problem) -> list[tuple[int, ...]]:
    """Those of the gradients of q, k and v, in the caller's layout."""
    return [caller_shape(x.shape, problem.layout) for x in (problem.query, problem.key, problem.value)]
