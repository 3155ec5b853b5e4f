"""Exceptions of cuattn that are not plain ``ValueError`` or ``TypeError``."""


class MissingDependencyError(ImportError):
    """An optional package is needed for what was asked; the message names the command that installs it."""


class CompileError(RuntimeError):
    """A kernel did not compile; the message shows the configuration, the flags, the log and the numbered source."""


class EmulatorError(RuntimeError):
    """The emulated kernel did what is an error on a device: a bad access, a race, divergence, a deadlock."""


class CacheWarning(UserWarning):
    """The kernel cache folder cannot be used; kernels are compiled into a temporary folder instead."""
