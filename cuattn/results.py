"""Results: made beside the inputs or the caller's own, filled, and handed back in the caller's library."""

from collections.abc import Callable
from functools import partial
from typing import Any

from cuattn import backend, dispatch
from cuattn.checks import Output, check_out, gradient_shapes, output_of
from cuattn.interop import Tensor
from cuattn.problem import Gradients, Problem, Upstream, in_kernel_axes


def fill(output: Output, compute: Callable[[Tensor, Tensor | None], None], out: Any, return_lse: bool) -> Any:
    """The output, ``out`` if it is given, or ``(output, lse)``.

    ``compute`` fills the output, in kernel axes, and the LSE where it is asked for; it is not called if the two have no
    element.
    """
    name, like = output.first
    framework = like.framework
    backend.active().for_device(like.device, name)  # refuses before anything is allocated
    if out is None:
        made = framework.empty(output.shape, output.dtype, like.device, like)
        result = in_kernel_axes(made, output.layout)
    else:
        result = check_out(out, output)
    lse = framework.empty(output.lse_shape, "float32", like.device, like) if return_lse else None
    if 0 not in output.lse_shape:
        compute(result, lse)
        if out is not None:
            framework.written(result)
    if out is None:
        out = framework.export(made, like)
    return out if lse is None else (out, framework.export(lse, like))


def attend(problem: Problem, out: Any, return_lse: bool) -> Any:
    """The results of attention, as of `fill`."""
    return fill(output_of(problem), partial(dispatch.execute, problem), out, return_lse)


def differentiate(problem: Problem, upstream: Upstream) -> tuple[Any, Any, Any]:
    """The gradients of the queries, the keys and the values, each C-contiguous in the caller's layout."""
    like = problem.query
    framework = like.framework
    backend.active().for_device(like.device)  # refuses before anything is allocated
    made = [framework.empty(shape, like.dtype, like.device, like) for shape in gradient_shapes(problem)]
    dispatch.execute_backward(problem, upstream, Gradients(*(in_kernel_axes(x, problem.layout) for x in made)))
    dq, dk, dv = (framework.export(x, like) for x in made)
    return dq, dk, dv
