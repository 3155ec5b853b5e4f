"""The kernels around attention: merging, appending, reading masks."""

from dataclasses import dataclass

from cuattn.config.base import Constants, KernelConfig, capability


@dataclass(frozen=True)
class CombineConfig(KernelConfig):
    """The left fold over the partial results of chunks: one block for a row, four columns a thread."""

    kernel = "combine"
    params = "CombineParams"

    value_dim: int
    dtype: str
    arch: str
    shared_bytes = 0

    @property
    def name(self) -> str:
        return f"{self.kernel}_d{self.value_dim}_{self.dtype}_{self.arch}"

    @property
    def overlaps(self) -> bool:  # type: ignore[override]
        return capability(self.arch) >= 90

    @property
    def threads(self) -> int:
        return -(-self.value_dim // 128) * 32

    @property
    def constants(self) -> Constants:
        return {
            "value_dim": self.value_dim,
            "float32": self.dtype == "float32",
            "bfloat16": self.dtype == "bfloat16",
            "threads": self.threads,
            "overlaps": self.overlaps,
        }


@dataclass(frozen=True)
class HelperConfig(KernelConfig):
    """A kernel that copies or counts: it depends on no head dim, mask or dtype."""

    arch: str

    @property
    def name(self) -> str:
        return f"{self.kernel}_{self.arch}"

    @property
    def constants(self) -> Constants:
        return {"threads": self.threads}


class AppendConfig(HelperConfig):
    """Writes new keys and values into a cache."""

    kernel = "append_kv"
    params = "AppendParams"
    threads = 256
    shared_bytes = 0


class ScanConfig(HelperConfig):
    """Turns a key padding mask into tables of places."""

    kernel = "scan_mask"
    params = "ScanParams"
    threads = 1024
    shared_bytes = 1024
