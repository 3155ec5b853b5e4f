"""`cuattn.testing` and `cuattn check` on a CUDA device."""

import numpy as np
import pytest
import torch

from cuattn import testing
from cuattn.cli import main
from cuattn.testing import Case, CupyLibrary, Library, TorchLibrary
from cuattn.testing.arrays import is_contiguous, library_of, raw_bits, values_of
from cuattn.testing.subject import Placement, contiguous, padded, rows_first

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["cupy", "torch"])
def library(request: pytest.FixtureRequest) -> Library:
    if request.param == "cupy":
        return CupyLibrary()
    if not torch.cuda.is_available():
        pytest.skip(f"needs torch with CUDA: this one is {torch.__version__}")
    return TorchLibrary(device="cuda:0")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("place", [contiguous, padded, rows_first])
def test_placements_hold_the_same_bits(library: Library, dtype: str, place: Placement) -> None:
    bits = testing.make_inputs(Case(5, 7, dtype=dtype, batch=2, heads=3)).q
    array = place(library, bits, dtype)
    assert library_of(array) == library
    np.testing.assert_array_equal(raw_bits(array)[0], bits)
    assert raw_bits(array)[1] == dtype
    assert is_contiguous(array) == (place is contiguous)
    poisoned = testing.poisoned_empty_like(array)
    assert library_of(poisoned) == library
    assert np.isnan(values_of(*raw_bits(poisoned))).all()
    testing.assert_bitwise_equal(array, contiguous(library, bits, dtype))


def test_check(library: Library, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["check", "--quick", "--backend", "cuda", "--library", library.name])
    text = capsys.readouterr().out
    assert code == 0, text
    assert f"backend cuda, {library.name} arrays on cuda:0" in text
