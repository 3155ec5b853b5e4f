"""What the emulator takes a GPU's instructions to do: against captures of an H200, an exact model, and a device."""

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from exact_products import Bits, Operands, exact_products, values
from hardware_kernels import cubin, emulated, functions, on_device, products

from cuattn.launch import device_architecture

DTYPES = ("bfloat16", "float16")
OPERANDS = (*DTYPES, "tf32")
INFINITY = {"bfloat16": 0x7F80, "float16": 0x7C00, "tf32": 0x7F800000}
#: Terms of a step of 16-bit operands and fraction bits, as published for Ampere and measured on Hopper.
STEPS = {"sm_80": (8, 24), "sm_86": (8, 24), "sm_89": (8, 24), "sm_90a": (16, 25), "sm_100a": (16, 25)}

#: Makes operands of a type, so many products, from a seed.
Make = Callable[[str, int, int], Operands]

#: Captures of products on an H200: (file, prefix of its arrays, cases in it). tests/data/README.md describes them.
CAPTURES = {
    "usual": ("h200_vectors", "", 600),
    "every magnitude": ("h200_edge_products", "finite_", 63),
    "infinities and nan": ("h200_edge_products", "special_", 63),
    "zeros": ("h200_edge_products", "zeros_", 63),
    "subnormal": ("h200_edge_products", "low_", 63),
    "overflowing": ("h200_edge_products", "high_", 63),
}
CAPTURED = [*((dtype, capture) for dtype in DTYPES for capture in CAPTURES), ("tf32", "usual")]


@functools.cache
def data(file: str) -> dict[str, npt.NDArray[np.generic]]:
    with np.load(Path(__file__).parent / "data" / f"{file}.npz") as arrays:
        return dict(arrays)


def captured_products(capture: str, dtype: str) -> tuple[Operands, Bits]:
    file, prefix, count = CAPTURES[capture]
    kind = {"bfloat16": "bf16", "float16": "fp16"}.get(dtype, dtype)
    a, b, c, d = (data(file)[f"{prefix}{kind}_{name}_bits"] for name in "abcd")
    assert d.shape == (count, 16, 8)
    if dtype == "tf32":  # what was multiplied there are these fp32 numbers rounded to nearest
        a, b = (x + np.uint32(1 << 12) for x in (a, b))
    return (a, b, c), d


def shapes(dtype: str, count: int) -> tuple[tuple[int, ...], ...]:
    columns = 8 if dtype == "tf32" else 16
    return (count, 16, columns), (count, 8, columns), (count, 16, 8)


def normal_operands(dtype: str, count: int, seed: int) -> Operands:
    """Normal numbers, with a spread of magnitudes in each sum."""
    rng = np.random.default_rng(seed)
    a, b, c = (
        (rng.standard_normal(shape) * np.exp2(rng.integers(-6, 7, shape))).astype(np.float32)
        for shape in shapes(dtype, count)
    )
    if dtype == "tf32":
        return a.view(np.uint32), b.view(np.uint32), c.view(np.uint32)
    narrow = [torch.from_numpy(x).to(getattr(torch, dtype)).view(torch.int16).numpy().view(np.uint16) for x in (a, b)]
    return narrow[0], narrow[1], c.view(np.uint32)


def finite_operands(dtype: str, count: int, seed: int) -> Operands:
    """Random bits of finite numbers: every magnitude, so that sums overflow and results are subnormal; also zeros."""
    rng = np.random.default_rng(seed)
    word = np.uint32 if dtype == "tf32" else np.uint16
    a, b, c = (
        rng.integers(0, np.iinfo(kind).max, shape, kind, endpoint=True)
        for shape, kind in zip(shapes(dtype, count), (word, word, np.uint32), strict=True)
    )
    for x, exponent in ((a, INFINITY[dtype]), (b, INFINITY[dtype]), (c, INFINITY["tf32"])):
        x[(x & exponent) == exponent] ^= x.dtype.type(exponent & -exponent)
        x[rng.random(x.shape) < 0.05] &= x.dtype.type(1 << (8 * x.itemsize - 1))
    return a, b, c


def uneven_operands(dtype: str, count: int, seed: int) -> Operands:
    """Subnormal and the smallest normal numbers times huge ones, all products within a few powers of two."""
    a, b, c = finite_operands(dtype, count, seed)
    exponent = INFINITY[dtype]
    unit = exponent & -exponent
    a &= a.dtype.type(~(exponent & ~(3 * unit)) & np.iinfo(a.dtype).max)
    b |= b.dtype.type(exponent & ~(3 * unit))
    b[(b & exponent) == exponent] ^= b.dtype.type(unit)
    c &= np.uint32(0x81FFFFFF)
    c |= np.uint32(0x3E000000)
    return a, b, c


def special_operands(dtype: str, count: int, seed: int) -> Operands:
    """Normal numbers with infinities and NaN among them."""
    a, b, c = normal_operands(dtype, count, seed)
    rng = np.random.default_rng(seed)
    nan = 1 << 13 if dtype == "tf32" else 1  # the last bit that counts
    for x, bits in ((a, INFINITY[dtype]), (b, INFINITY[dtype]), (c, INFINITY["tf32"])):
        x[rng.random(x.shape) < 0.01] = bits
        x[rng.random(x.shape) < 0.01] = bits | 1 << (8 * x.itemsize - 1)
        x[rng.random(x.shape) < 0.002] = bits + nan
        x[rng.random(x.shape) < 0.002] = 0
    return a, b, c


@pytest.mark.parametrize(("dtype", "capture"), CAPTURED)
def test_every_captured_product_is_equal(dtype: str, capture: str) -> None:
    operands, expected = captured_products(capture, dtype)
    np.testing.assert_array_equal(products(emulated("sm_90a"), dtype, *operands), expected)
    if capture == "usual":  # control: another GPU's steps do not give them
        assert (products(emulated("sm_80"), dtype, *operands) != expected).any()


@pytest.mark.parametrize("arch", STEPS)
@pytest.mark.parametrize(("dtype", "capture"), [x for x in CAPTURED if x[1] in ("usual", "subnormal", "zeros")])
def test_captured_products_are_those_of_an_exact_model(dtype: str, arch: str, capture: str) -> None:
    (a, b, c), captured = captured_products(capture, dtype)
    few = slice(None, None, len(a) // 6)
    expected = exact_products(dtype, (a[few], b[few], c[few]), *STEPS[arch])
    np.testing.assert_array_equal(products(emulated(arch), dtype, a[few], b[few], c[few]), expected)
    if STEPS[arch] == STEPS["sm_90a"]:
        np.testing.assert_array_equal(captured[few], expected)


@pytest.mark.parametrize("dtype", OPERANDS)
class TestProducts:
    @pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
    @pytest.mark.parametrize("make", [finite_operands, uneven_operands])
    def test_products_are_those_of_an_exact_model(self, dtype: str, arch: str, make: Make) -> None:
        operands = make(dtype, 6, 2)
        expected = exact_products(dtype, operands, *STEPS[arch])
        np.testing.assert_array_equal(products(emulated(arch), dtype, *operands), expected)

    @pytest.mark.parametrize(("arch", "share"), [("sm_80", 2), ("sm_90a", 1)])
    def test_the_order_inside_a_step_does_not_matter(self, dtype: str, arch: str, share: int) -> None:
        a, b, c = normal_operands(dtype, 50, seed=3)
        rng = np.random.default_rng(3)
        columns = np.arange(a.shape[-1])
        inside = np.concatenate([rng.permutation(step) for step in np.split(columns, share)])
        launch = emulated(arch)
        expected = products(launch, dtype, a, b, c)
        np.testing.assert_array_equal(products(launch, dtype, a[..., inside], b[..., inside], c), expected)
        across = columns.reshape(2, -1).T.reshape(-1)
        # control: terms that change their step change bits
        assert (products(launch, dtype, a[..., across], b[..., across], c) != expected).any() == (share == 2)

    @pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
    def test_a_row_of_zeros_leaves_the_accumulator_alone(self, dtype: str, arch: str) -> None:
        a, b, c = normal_operands(dtype, 20, seed=4)
        np.testing.assert_array_equal(products(emulated(arch), dtype, np.zeros_like(a), b, c), c)
        assert (products(emulated(arch), dtype, a, b, c) != c).any()

    @pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
    def test_infinities_and_nan_are_those_of_ieee_arithmetic(self, dtype: str, arch: str) -> None:
        a, b, c = special_operands(dtype, 60, seed=5)
        got = products(emulated(arch), dtype, a, b, c).view(np.float32)
        with np.errstate(invalid="ignore"):
            wide = [values(a, dtype)[:, :, None], values(b, dtype)[:, None], c.view(np.float32).astype(np.float64)]
            expected = (wide[0] * wide[1]).sum(-1) + wide[2]
        special = ~np.isfinite(expected)
        assert np.isnan(expected).any()
        assert np.isinf(expected).any()
        np.testing.assert_array_equal(got[special], expected[special].astype(np.float32))
        assert set(got.view(np.uint32)[np.isnan(expected)].tolist()) == {0x7FFFFFFF}


def test_the_low_bits_of_tf32_do_not_matter() -> None:
    a, b, c = normal_operands("tf32", 50, seed=9)
    ignored = np.random.default_rng(9).integers(0, 1 << 13, a.shape, np.uint32)
    launch = emulated("sm_90a")
    expected = products(launch, "tf32", a, b, c)
    np.testing.assert_array_equal(products(launch, "tf32", a ^ ignored, b ^ ignored[:, :8], c), expected)
    # control: the lowest bit that counts
    assert (products(launch, "tf32", a ^ np.uint32(1 << 13), b, c) != expected).any()


@pytest.mark.parametrize("dtype", OPERANDS)
def test_ampere_and_hopper_differ(dtype: str) -> None:
    operands = normal_operands(dtype, 50, seed=6)
    ampere, hopper = (products(emulated(arch), dtype, *operands) for arch in ("sm_80", "sm_90a"))
    share = (ampere != hopper).mean()
    assert 0.01 < share < 0.99
    assert np.allclose(ampere.view(np.float32), hopper.view(np.float32), rtol=1e-5, atol=1e-2)


def test_every_captured_power_is_equal() -> None:
    x, y = data("h200_vectors")["ex2_x_bits"].view(np.float32), data("h200_vectors")["ex2_y_bits"]
    assert x.shape == (131072,)
    got = functions(emulated("sm_90a"), x).exp2
    np.testing.assert_array_equal(got, y)
    # control: the nearest fp32 number is not always what the hardware gives
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        nearest = np.exp2(x.astype(np.float64)).astype(np.float32).view(np.uint32)
    normal = np.isfinite(x) & (np.abs(x) < 100)
    assert (nearest[normal] != y[normal]).any()


def test_logarithms_are_accurate() -> None:
    """Below one unit in the last place of the larger of |ln x| and 1/4, at every exponent and densely around 1."""
    rng = np.random.default_rng(7)
    exponents = np.repeat(np.arange(-126, 128), 1000)
    spread = np.ldexp(1 + rng.random(exponents.size), exponents).astype(np.float32)
    around_one = np.linspace(0.5, 2, 200_000, dtype=np.float32)
    edges = np.array([1, 2, 0.5, 2 / 3, 4 / 3, np.finfo(np.float32).tiny, np.finfo(np.float32).max], np.float32)
    x = np.concatenate([spread[np.isfinite(spread)], around_one, edges, np.nextafter(edges[:5], np.float32(0))])
    exact = np.log(x.astype(np.float64))
    got = functions(emulated("sm_90a"), x).log.view(np.float32)
    unit = np.spacing(np.maximum(np.abs(exact), 0.25).astype(np.float32)).astype(np.float64)
    errors = np.abs(got - exact) / unit
    assert errors.max() < 1, f"{errors.max()} at {x[errors.argmax()]}"
    special = np.array([1, np.inf, np.nan], np.float32)
    np.testing.assert_array_equal(functions(emulated("sm_90a"), special).log.view(np.float32), [0, np.inf, np.nan])


def every_case_of_rounding(dtype: torch.dtype) -> npt.NDArray[np.float32]:
    """Each 16-bit number, the midpoints between neighbours, the fp32 numbers beside both, and random bits."""
    narrow = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype).to(torch.float32).numpy()
    with np.errstate(invalid="ignore", over="ignore"):
        low, high = narrow[:-1].astype(np.float64), narrow[1:].astype(np.float64)
        middle = ((low + high) / 2).astype(np.float32)
        bits = np.concatenate([narrow, middle]).view(np.uint32)
    random = np.random.default_rng(8).integers(0, 1 << 32, 200_000, np.uint32)
    return np.concatenate([bits, bits + np.uint32(1), bits - np.uint32(1), random]).view(np.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_conversions_round_as_torch_does(dtype: str) -> None:
    x = every_case_of_rounding(getattr(torch, dtype))
    results = functions(emulated("sm_90a"), x)
    got = results.bf16 if dtype == "bfloat16" else results.fp16
    expected = torch.from_numpy(x).to(getattr(torch, dtype)).view(torch.int16).numpy().view(np.uint16)
    nan = np.isnan(x)
    np.testing.assert_array_equal(got[~nan], expected[~nan])
    assert set(got[nan].tolist()) == {0x7FFF}


def test_the_floating_point_mode_of_the_caller_does_not_matter() -> None:
    """Some of these products are subnormal in fp32."""
    operands, expected = captured_products("subnormal", "bfloat16")
    magnitude = np.abs(expected.view(np.float32))
    assert ((magnitude > 0) & (magnitude < 2.0**-126)).any()

    def flushes() -> bool:
        return bool(np.float32(1e-40) * np.float32(0.5) == 0)

    if not torch.set_flush_denormal(True):
        pytest.skip("needs a processor that can flush subnormals")
    try:
        before = flushes()
        got = products(emulated("sm_90a"), "bfloat16", *operands)
        after = flushes()
    finally:
        torch.set_flush_denormal(False)
    np.testing.assert_array_equal(got, expected)
    assert before, "the mode was on"
    assert after, "the mode is left as it was"


def test_the_device_kernels_compile_without_a_device() -> None:
    assert cubin("sm_80")[:4] == b"\x7fELF"


@pytest.mark.gpu
class TestDevice:
    """The same source, run on a GPU and emulated as that GPU."""

    @pytest.mark.parametrize(("dtype", "capture"), CAPTURED)
    def test_captured_products(self, dtype: str, capture: str) -> None:
        arch = device_architecture(0)
        operands, captured = captured_products(capture, dtype)
        got = products(on_device(arch), dtype, *operands)
        np.testing.assert_array_equal(got, products(emulated(arch), dtype, *operands))
        if arch == "sm_90a":
            np.testing.assert_array_equal(got, captured)

    @pytest.mark.parametrize("make", [normal_operands, finite_operands, uneven_operands, special_operands])
    @pytest.mark.parametrize("dtype", OPERANDS)
    def test_products(self, dtype: str, make: Make) -> None:
        arch = device_architecture(0)
        operands = make(dtype, 500, 10)
        np.testing.assert_array_equal(
            products(on_device(arch), dtype, *operands), products(emulated(arch), dtype, *operands)
        )

    def test_functions(self) -> None:
        arch = device_architecture(0)
        powers = data("h200_vectors")["ex2_x_bits"].view(np.float32)
        x = np.concatenate([every_case_of_rounding(torch.float16), every_case_of_rounding(torch.bfloat16), powers])
        device, emulator = functions(on_device(arch), x), functions(emulated(arch), x)
        positive = x >= np.finfo(np.float32).tiny  # what natural_log is for
        for name in ("exp2", "bf16", "fp16"):
            np.testing.assert_array_equal(getattr(device, name), getattr(emulator, name), err_msg=name)
        np.testing.assert_array_equal(device.log[positive], emulator.log[positive])
        if arch == "sm_90a":
            np.testing.assert_array_equal(device.exp2[-powers.size :], data("h200_vectors")["ex2_y_bits"])
