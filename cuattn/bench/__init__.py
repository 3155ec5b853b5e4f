"""The benchmarks behind ``cuattn bench``: what is measured, beside whom, and pictures of it.

A module for each benchmark (prefill, chunked, decode, backward, host, jit) has ``add_options(parser)`` and
``run(options)``, which returns the exit status; its docstring says what is measured and how. Importing them needs NumPy
alone; measuring needs the extra ``bench``.
"""
