"""torch tensors, on the CPU and on CUDA devices."""

from functools import lru_cache
from typing import Any

import numpy.typing as npt

from cuattn.interop.tensor import CPU, Device, Tensor, contiguous_strides


@lru_cache
def _dtype_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


@lru_cache
def _device_of(device: Any) -> Device | None:
    """None for memory that neither a CPU nor a CUDA device reads."""
    if device.type == "cpu":
        return CPU
    return Device("cuda", device.index) if device.type == "cuda" else None


def _why_not_addressable(tensor: Any) -> str | None:
    """What keeps a tensor from being a pointer with strides; None if nothing does."""
    import torch

    if tensor.layout is not torch.strided or tensor.is_nested:
        return "a nested tensor" if tensor.is_nested else f"a tensor of layout {tensor.layout}"
    if _device_of(tensor.device) is None:
        return f"a tensor on device {tensor.device}"
    # Asking a fake tensor for its pointer warns or raises, depending on the version; plain tensors skip the search.
    if type(tensor) is not torch.Tensor and hasattr(tensor, "fake_mode"):
        return "a fake tensor"
    if tensor.is_conj():
        return "a conjugated view"
    try:
        missing = tensor.data_ptr() == 0 and tensor.numel()
    except RuntimeError:  # a wrapper, such as those of vmap and grad
        missing = True
    return "a tensor without storage" if missing else None


class TorchFramework:
    """Records no gradients, which `cuattn.autograd` does: a tensor that requires them is read as it is."""

    name = "torch"

    def wrap(self, array: Any, name: str) -> Tensor:
        """Reads the tensor's fields: 0.07 us for the pointer, where building a DLPack capsule takes 3 us."""
        import torch

        reason = _why_not_addressable(array)
        device = _device_of(array.device)
        if reason is not None or device is None:
            raise TypeError(f"{name}: got {reason}, expected a strided torch tensor in CPU or CUDA memory")
        # Memory behind a set negative bit holds the values with the wrong sign; nobody would see writes to its copy.
        negated = array.is_neg()
        tensor = array.resolve_neg() if negated else array
        return Tensor(
            pointer=tensor.data_ptr(),
            shape=tuple(tensor.shape),
            strides=tensor.stride(),
            dtype=_dtype_name(tensor.dtype),
            device=device,
            framework=self,
            owner=tensor,
            readonly=negated,
            requires_grad=array.requires_grad and torch.is_grad_enabled(),
        )

    def empty(self, shape: tuple[int, ...], dtype: str, device: Device, like: Tensor) -> Tensor:
        import torch

        array = torch.empty(shape, dtype=getattr(torch, dtype), device=str(device))
        return Tensor(array.data_ptr(), shape, contiguous_strides(shape), dtype, device, self, array)

    def export(self, tensor: Tensor, like: Tensor) -> Any:
        return tensor.owner

    def written(self, tensor: Tensor) -> None:
        """Autograd then notices that a tensor it saved for a backward pass was changed."""
        import torch

        if not tensor.owner.is_inference():  # which has no version counter
            torch.autograd.graph.increment_version(tensor.owner)

    def to_host(self, tensor: Tensor) -> npt.NDArray[Any]:
        array: npt.NDArray[Any] = tensor.owner.cpu().numpy()
        return array

    def stream(self, device: Device) -> int:
        if device.kind == "cpu":
            return 0
        import torch

        return int(torch.cuda.current_stream(device.index).cuda_stream)
