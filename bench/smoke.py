"""A first look at a GPU: every kernel and public function gives the emulator's bits. Needs CuPy and a C++ compiler.

The emulator takes the part of this GPU's architecture. Its model of tensor cores was compared with an H200 (sm_90a)
alone: elsewhere other bits mean that the model is wrong, or a kernel. Exit status 1 if a call gives other bits or
fails.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from calls import CALLS

import cuattn
from cuattn.testing import CupyLibrary, NumpyLibrary
from cuattn.testing.arrays import Bits, raw_bits
from cuattn.testing.bitwise import assert_same_bits

Results = Sequence[tuple[Bits, str]]  # raw bits and dtype of each array


def on_device(name: str) -> Results:
    return [raw_bits(array) for array in CALLS[name](CupyLibrary())]


def on_emulator(name: str, arch: str) -> Results:
    with cuattn.use_backend("emulator", arch):
        return [raw_bits(array) for array in CALLS[name](NumpyLibrary())]


def why_different(actual: Results, expected: Results) -> str | None:
    try:
        for number, ((bits, dtype), (expected_bits, _)) in enumerate(zip(actual, expected, strict=True)):
            assert_same_bits(bits, expected_bits, dtype, f"array {number}")
    except AssertionError as error:
        return str(error)
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("calls", nargs="*", metavar="CALL", help="some of: " + "; ".join(CALLS))
    options = parser.parse_args()
    unknown = set(options.calls) - set(CALLS)
    if unknown:
        parser.error(f"CALL: got {', '.join(sorted(unknown))}, expected some of {'; '.join(CALLS)}")

    from cuattn.devices import device_architecture

    arch = device_architecture(0)
    names = options.calls or list(CALLS)
    start = time.perf_counter()
    bad = 0
    with ThreadPoolExecutor() as pool:  # its work is the C++ compiler's
        emulated = {name: pool.submit(on_emulator, name, arch) for name in names}
        for name in names:
            try:
                reason = why_different(on_device(name), emulated[name].result())
            except Exception as error:  # the other calls tell more
                reason = f"{type(error).__name__}: {error}"
            bad += reason is not None
            print(f"{name:26} {reason or 'same bits'}", flush=True)
    seconds = time.perf_counter() - start
    print(f"{len(names) - bad} of {len(names)} calls with the emulator's bits for {arch}, {seconds:.0f} s")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
