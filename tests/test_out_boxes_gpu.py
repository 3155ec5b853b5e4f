"""Rows that the copy engine stores, on a GPU: the bits of the portable kernels.

Launches are planned here, with outputs that have gaps between their rows, and with the portable kernels.
"""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from changed import change

from cuattn.checks import check_attention
from cuattn.config import ForwardSm90Config, hopper
from cuattn.interop import Tensor, import_tensor
from cuattn.launch import device_architecture, load_anew, processor_count, words_of
from cuattn.launches import Target
from cuattn.schedule import plan_forward
from cuattn.tensor_map import argument, encode
from cuattn.testing import BitwiseMismatch, assert_bitwise_equal

pytestmark = pytest.mark.gpu
CASES = [
    *((group, (128, 128), layout) for group, layout in product((1, 2, 4, 8, 16), ("bhsd", "bshd"))),
    *((2, dims, "bshd") for dims in ((64, 64), (72, 72), (24, 40), (96, 96), (192, 128), (128, 192), (256, 64))),
]


@pytest.fixture(autouse=True)
def hopper_gpu() -> None:
    if device_architecture(0) != hopper.ARCH:
        pytest.skip(f"needs a device of {hopper.ARCH}, not {device_architecture(0)}")


def computed(arch: str, tensors: list[torch.Tensor], mask: str, layout: str, gap: int, with_lse: bool) -> Any:
    """(output, LSE or None, whether rows left as boxes); ``gap`` columns lie between the output's rows."""
    problem = check_attention(*tensors, mask, None, None, layout, 1)
    batch, heads, rows = problem.query.shape[:3]
    columns = problem.value_dim
    shape = (batch, heads, rows) if layout == "bhsd" else (batch, rows, heads)
    wide = torch.full((*shape, columns + gap), torch.nan, dtype=tensors[0].dtype, device="cuda")
    out = wide[..., :columns] if layout == "bhsd" else wide[..., :columns].transpose(1, 2)
    lse = torch.full((batch, heads, rows), torch.nan, device="cuda") if with_lse else None

    def allocate(shape: tuple[int, ...], dtype: str) -> Tensor:
        return problem.query.framework.empty(shape, dtype, problem.query.device, problem.query)

    target = Target(arch, processor_count(0))
    outputs = import_tensor(out, "out"), None if lse is None else import_tensor(lse, "lse")
    launches = plan_forward(problem, *outputs, target, allocate)
    stream = torch.cuda.current_stream().cuda_stream
    for one in launches:
        words = words_of(argument(one.params, one.tensor_maps, encode))
        kernel = load_anew(one.config)
        kernel.launch(one.grid, words, stream, one.cluster)
        torch.cuda.synchronize()  # before kernel and words go
    assert torch.isnan(wide[..., columns:]).all(), "nothing is written between rows"
    stored = [one.config.out_boxes for one in launches if isinstance(one.config, ForwardSm90Config)]
    return out.contiguous(), lse, stored


@pytest.mark.parametrize(("group", "dims", "layout"), CASES)
def test_the_bits_of_the_portable_kernels(group: int, dims: tuple[int, int], layout: str) -> None:
    """Tiles that end inside of boxes, of one chunk and of several; more tiles than a device has multiprocessors."""
    for mask, (batch, rows, keys), gap in (("causal", (40, 333, 333), 0), ("full", (3, 150, 2700), 8)):
        shapes = [(batch, 2 * group, rows, dims[0]), *((batch, 2, keys, dim) for dim in dims)]
        shapes = [(b, n, h, d) if layout == "bshd" else (b, h, n, d) for b, h, n, d in shapes]
        generator = torch.Generator("cuda").manual_seed(group)
        tensors = [torch.randn(s, generator=generator, device="cuda").to(torch.bfloat16) for s in shapes]
        out, lse, _ = computed("sm_90", tensors, mask, layout, gap, with_lse=True)
        for with_lse in (True, False):
            own, own_lse, stored = computed(hopper.ARCH, tensors, mask, layout, gap, with_lse)
            assert stored == [True]
            assert_bitwise_equal(own, out)
            if with_lse:
                assert_bitwise_equal(own_lse, lse)


def test_control(sources: Path) -> None:
    """A kernel whose rows go to other places has other bits."""
    tensors = [torch.randn(1, heads, 150, 64, device="cuda").to(torch.bfloat16) for heads in (4, 2, 2)]
    out, _, _ = computed("sm_90", tensors, "full", "bhsd", 0, with_lse=False)
    change(sources / "attn/out_boxes.cuh", "head * (rows >> shift) + token", "row")
    changed, _, stored = computed(hopper.ARCH, tensors, "full", "bhsd", 0, with_lse=False)
    assert stored == [True]
    with pytest.raises(BitwiseMismatch):
        assert_bitwise_equal(changed, out)
