"""Arrays of other libraries: torch, CuPy, NumPy, and any that implements DLPack (JAX, for one).

None of them but NumPy is imported before one of its arrays is seen.
"""

import sys
from functools import lru_cache
from typing import Any

from cuattn.interop.cupy_ import CupyFramework
from cuattn.interop.dlpack import DlpackFramework
from cuattn.interop.numpy_ import NumpyFramework
from cuattn.interop.tensor import CPU, Device, Framework, Tensor, contiguous_strides, host_bits, share_memory
from cuattn.interop.torch_ import TorchFramework

__all__ = ["CPU", "Device", "Framework", "Tensor", "contiguous_strides", "host_bits", "import_tensor", "share_memory"]

#: (module, array class in it, framework): the libraries whose arrays are read without DLPack.
_NATIVE: tuple[tuple[str, str, Framework], ...] = (
    ("torch", "Tensor", TorchFramework()),
    ("cupy", "ndarray", CupyFramework()),
    ("numpy", "ndarray", NumpyFramework()),
)
_DLPACK = DlpackFramework()


@lru_cache
def _framework_of(array_type: type[Any]) -> Framework | None:
    """The framework of a type, or None. An array exists only after its library was imported, so none is imported."""
    for module, class_name, framework in _NATIVE:
        native = getattr(sys.modules.get(module), class_name, None)
        if native is not None and issubclass(array_type, native):
            return framework
    return _DLPACK if hasattr(array_type, "__dlpack__") else None


def import_tensor(array: Any, name: str) -> Tensor:
    """View ``array`` as a Tensor, without a copy (but for a torch tensor with the negative bit set).

    ``name`` is the argument that errors name. Raises TypeError for what is no array, or none in CPU or CUDA memory
    with strides, and ValueError for strides that are no whole numbers of elements.
    """
    array_type: Any = type(array)
    framework = _framework_of(array_type)
    if framework is None:
        raise TypeError(
            f"{name}: got {array_type.__name__}, "
            "expected a torch, CuPy or NumPy array or another object with __dlpack__"
        )
    return framework.wrap(array, name)
