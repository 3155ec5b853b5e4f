"""`cuattn.attention` on a CUDA device: accuracy, array libraries, streams, CUDA graphs, large tensors."""

import threading
from contextlib import AbstractContextManager
from dataclasses import replace

import numpy as np
import pytest
import torch

import cuattn
from cuattn import testing
from cuattn.testing import Case, CupyLibrary, Library, Subject, TorchLibrary, assert_bitwise_equal
from cuattn.testing.arrays import raw_bits

pytestmark = pytest.mark.gpu

CASE = Case(150, 700, "causal", "bfloat16", 128, batch=2, heads=4, kv_heads=2)


def need_torch_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip(f"needs torch with CUDA: this one is {torch.__version__}")


@pytest.fixture(params=["torch", "cupy"])
def library(request: pytest.FixtureRequest) -> Library:
    if request.param == "cupy":
        return CupyLibrary()
    need_torch_gpu()
    return TorchLibrary(device="cuda:0")


def cuda_tensors(case: Case) -> list[torch.Tensor]:
    need_torch_gpu()
    inputs = testing.make_inputs(case)
    return [TorchLibrary(device="cuda:0").array(x, case.dtype) for x in (inputs.q, inputs.k, inputs.v)]


def own_stream(library: Library) -> AbstractContextManager[object]:
    """A new stream, current inside the block; it does not wait for the default stream."""
    if library.name == "torch":
        return torch.cuda.stream(torch.cuda.Stream())
    import cupy

    return cupy.cuda.Stream(non_blocking=True)


def wait_for_device() -> None:
    import cupy

    cupy.cuda.Device(0).synchronize()


class TestResults:
    @pytest.mark.parametrize("head_dim", [64, 128])
    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_accuracy(self, library: Library, dtype: str, head_dim: int) -> None:
        for case in testing.accuracy_cases("large", (dtype,), (head_dim,)):
            testing.assert_accurate(cuattn.attention, case, library)

    @pytest.mark.parametrize("head_dim", [64, 128])
    @pytest.mark.parametrize("mask", ["causal", "full"])
    def test_shapes(self, library: Library, mask: str, head_dim: int) -> None:
        for len_q, len_k in ((1, 1), (113, 203), (799, 3), (1023, 1024), (3, 2049), (1, 5000)):
            case = Case(len_q, len_k, mask, "bfloat16", head_dim, 2, 6, 2)
            testing.assert_accurate(cuattn.attention, case, library)

    def test_libraries_give_the_same_bits(self) -> None:
        need_torch_gpu()
        results = [Subject(cuattn.attention, x, CASE).baseline for x in (TorchLibrary(device="cuda:0"), CupyLibrary())]
        results[0].assert_equals(results[1], "torch against CuPy")

    def test_result_types(self, library: Library) -> None:
        inputs = testing.make_inputs(CASE)
        q, k, v = (library.array(x, CASE.dtype) for x in (inputs.q, inputs.k, inputs.v))
        out, lse = cuattn.attention(q, k, v, "causal", return_lse=True)
        assert type(out) is type(lse) is type(q)
        assert (out.device, lse.device, out.dtype) == (q.device, q.device, q.dtype)
        given = testing.poisoned_empty_like(q)
        assert cuattn.attention(q, k, v, "causal", out=given) is given
        assert_bitwise_equal(given, out)

    def test_nothing(self, library: Library) -> None:
        empty = np.zeros((2, 3, 0, 64), np.uint16)
        some = np.zeros((2, 3, 5, 64), np.uint16)
        for rows, keys in (
            (empty, some),
            (some, empty),
            (empty, empty),
            (some[:0], some[:0]),
            (some[:, :0], some[:, :0]),
        ):
            q, k = library.array(rows, "float16"), library.array(keys, "float16")
            out, lse = cuattn.attention(q, k, k, return_lse=True)
            assert (tuple(out.shape), tuple(lse.shape)) == (rows.shape, rows.shape[:3])
            assert not raw_bits(out)[0].any()
            assert (raw_bits(lse)[0].view(np.float32) == -np.inf).all() or keys.size

    def test_gradients_change_no_bits(self) -> None:
        q, k, v = cuda_tensors(CASE)
        expected = cuattn.attention(q, k, v)
        q.requires_grad_()
        out = cuattn.attention(q, k, v)
        assert out.requires_grad
        assert_bitwise_equal(out, expected)

    def test_jax(self) -> None:
        jax = pytest.importorskip("jax", reason="needs JAX with CUDA")
        try:
            device = jax.devices("cuda")[0]
        except RuntimeError as error:
            pytest.skip(f"needs JAX with CUDA: {error}")
        case = replace(CASE, dtype="float16")
        inputs = testing.make_inputs(case)
        q, k, v = (jax.device_put(x.view(np.float16), device) for x in (inputs.q, inputs.k, inputs.v))
        out, lse = cuattn.attention(q, k, v, "causal", return_lse=True)
        assert isinstance(out, jax.Array)
        assert out.devices() == q.devices()
        expected = Subject(cuattn.attention, CupyLibrary(), case).baseline
        np.testing.assert_array_equal(np.asarray(out).view(np.uint16), expected.out)
        np.testing.assert_array_equal(np.asarray(lse).view(np.uint32), expected.lse)

    def test_mixed_devices(self) -> None:
        q, k, v = cuda_tensors(CASE)
        with pytest.raises(ValueError, match="k: got device cpu, expected q's cuda:0"):
            cuattn.attention(q, k.cpu(), v)
        with pytest.raises(ValueError, match="out: got device cpu, expected q's cuda:0"):
            cuattn.attention(q, k, v, out=q.cpu())


class TestStreams:
    def test_returns_before_the_stream_has_run(self) -> None:
        """Queued behind a long wait, on a stream of the caller's, without waiting for it."""
        q, k, v = cuda_tensors(CASE)
        expected = cuattn.attention(q, k, v, "causal")
        side, done, before = torch.cuda.Stream(), torch.cuda.Event(), torch.cuda.get_sync_debug_mode()
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(2_000_000_000)  # clocks: about a second
            torch.cuda.set_sync_debug_mode("error")
            try:
                out = cuattn.attention(q, k, v, "causal")
            finally:
                torch.cuda.set_sync_debug_mode(before)
            done.record()
        assert not done.query(), "the call has waited for the stream"
        side.synchronize()
        assert_bitwise_equal(out, expected)

    def test_order_on_a_side_stream(self, library: Library) -> None:
        """What the caller's stream wrote just before the call, behind a long wait, is what is read."""
        case = replace(CASE, dtype="float16")
        inputs = testing.make_inputs(case)
        q, k, v = (library.array(x, case.dtype) for x in (inputs.q, inputs.k, inputs.v))
        expected = cuattn.attention(q, k, v, "causal")
        late = testing.poisoned_empty_like(q)
        wait_for_device()
        with own_stream(library):
            if library.name == "torch":
                torch.cuda._sleep(200_000_000)
            late[...] = q
            out = cuattn.attention(late, k, v, "causal")
            assert_bitwise_equal(out, expected)

    def test_threads(self, library: Library) -> None:
        """Several threads at once, each with inputs and a stream of its own."""
        cases = [replace(CASE, seed=seed, head_dim=64 + 64 * (seed % 2)) for seed in range(4)]
        expected = [Subject(cuattn.attention, library, case).baseline for case in cases]
        failures: list[BaseException] = []

        def work(index: int) -> None:
            try:
                with own_stream(library):
                    for run in range(20):
                        result = Subject(cuattn.attention, library, cases[index]).baseline
                        result.assert_equals(expected[index], f"run {run} in thread {index}")
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures


class TestGraphs:
    def test_torch_graph(self) -> None:
        """Captured once, replayed with other inputs in the same memory: the bits of an eager call."""
        q, k, v = cuda_tensors(CASE)
        others = cuda_tensors(replace(CASE, seed=1))
        expected = [cuattn.attention(*x, "causal", return_lse=True) for x in ((q, k, v), others)]
        expected = [tuple(x.clone() for x in pair) for pair in expected]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, lse = cuattn.attention(q, k, v, "causal", return_lse=True)
        for arrays, (expected_out, expected_lse) in zip(
            ((q, k, v), others, (q, k, v)), (*expected, expected[1]), strict=True
        ):
            for mine, new in zip((q, k, v), arrays, strict=True):
                mine.copy_(new)
            out.fill_(torch.nan)
            graph.replay()
            assert_bitwise_equal(out, expected_out)
            assert_bitwise_equal(lse, expected_lse)

    def test_cupy_graph(self) -> None:
        import cupy

        inputs = testing.make_inputs(CASE)
        q, k, v = (CupyLibrary().array(x, CASE.dtype) for x in (inputs.q, inputs.k, inputs.v))
        expected = cuattn.attention(q, k, v, "causal")
        out = testing.poisoned_empty_like(q)
        wait_for_device()
        stream = cupy.cuda.Stream(non_blocking=True)
        with stream:
            cuattn.attention(q, k, v, "causal", out=out)  # CuPy's pool of this stream gets the memory of the LSE
            stream.synchronize()
            out.view(np.uint16)[...] = 0xFFFF
            stream.begin_capture()
            cuattn.attention(q, k, v, "causal", out=out)
            graph = stream.end_capture()
            for _ in range(2):
                out.view(np.uint16)[...] = 0xFFFF
                graph.launch(stream)
                stream.synchronize()
                assert_bitwise_equal(out, expected)


class TestLarge:
    def test_more_than_2_to_the_31_elements(self) -> None:
        """Query, keys, values and output of 2.2 * 10**9 elements each; the last sequence against itself alone."""
        need_torch_gpu()
        free, _ = torch.cuda.mem_get_info()
        if free < 24e9:
            pytest.skip(f"needs 24 GB of device memory: {free / 1e9:.0f} GB are free")
        batch, heads, length = 33, 1024, 1024
        q = torch.zeros(batch, heads, length, 64, dtype=torch.float16, device="cuda")
        assert q.numel() > 2**31
        q[-1].normal_()
        out, lse = cuattn.attention(q, q, q, "causal", return_lse=True)
        alone, alone_lse = cuattn.attention(q[-1:], q[-1:], q[-1:], "causal", return_lse=True)
        assert torch.equal(out[-1:].view(torch.int16), alone.view(torch.int16))
        assert torch.equal(lse[-1:].view(torch.int32), alone_lse.view(torch.int32))
        assert alone.abs().max() > 0
        assert not out[0].any()

    @pytest.mark.parametrize("axis", [0, 1, 2])
    def test_strides_beyond_32_bits(self, axis: int) -> None:
        q, k, v = cuda_tensors(Case(2, 2, "full", "float16", batch=2, heads=2, kv_heads=2))
        if torch.cuda.mem_get_info()[0] < 24e9:
            pytest.skip("needs 24 GB of device memory")
        step = 2**31 + 64

        def far(x: torch.Tensor) -> torch.Tensor:
            strides = list(x.stride())
            strides[axis] = step
            view = torch.empty(step + x.numel(), dtype=x.dtype, device="cuda").as_strided(x.shape, strides)
            view.copy_(x)
            return view

        out = far(torch.full_like(q, torch.nan))
        cuattn.attention(far(q), far(k), far(v), out=out)
        assert_bitwise_equal(out, cuattn.attention(q, k, v))

    def test_many_keys(self) -> None:
        """A head of more than 2**31 bytes."""
        need_torch_gpu()
        length = 2**24 + 3
        k = torch.zeros(1, 1, length, 64, dtype=torch.bfloat16, device="cuda")
        v = torch.full_like(k, 2.0)
        out, lse = cuattn.attention(k[:, :, :2], k, v, return_lse=True)
        assert (out == 2).all()
        assert torch.allclose(lse.double(), torch.tensor(float(length)).double().log().cuda(), rtol=1e-6)
