"""The kernels on a CPU: the unchanged CUDA C++ sources, compiled by the host's C++ compiler and run thread by thread.

``include/`` stands in for the CUDA built-ins and for kernels_cu/ptx/; the include path decides, so a kernel does not
know where it runs. Tensor-core products and ex2 are bit-exact models of an NVIDIA H200 (`cuattn.emulator.hardware`);
all else that the kernels compute are IEEE operations. Wrong accesses, races, divergence and deadlocks are
EmulatorErrors. So are mistakes with what runs asynchronously, such as copies into memory that is still read and results
of warpgroup products before the wait for them.
"""

from cuattn.emulator.run import SCHEDULES, run

__all__ = ["SCHEDULES", "run"]
