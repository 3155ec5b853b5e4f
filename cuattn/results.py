"""Results: made beside the inputs or the caller's own, filled, and handed back in the caller's library."""

from collections.abc import Callable
from typing import Any

from cuattn import backend
from cuattn.checks import Output, check_out
from cuattn.interop import Tensor
from cuattn.problem import in_kernel_axes


def fill(output: Output, compute: Callable[[Tensor, Tensor], None], out: Any, return_lse: bool) -> Any:
    """The output, ``out`` if it is given, or ``(output, lse)``.

    ``compute`` fills the output, in kernel axes, and the LSE; it is not called if the two have no element.
    """
    name, like = output.first
    framework = like.framework
    backend.active().for_device(like.device, name)  # refuses before anything is allocated
    if out is None:
        made = framework.empty(output.shape, output.dtype, like.device, like)
        result = in_kernel_axes(made, output.layout)
    else:
        result = check_out(out, output)
    lse = framework.empty(output.lse_shape, "float32", like.device, like)
    if 0 not in lse.shape:
        compute(result, lse)
        if out is not None:
            framework.written(result)
    if out is None:
        out = framework.export(made, like)
    return (out, framework.export(lse, like)) if return_lse else out
