"""The cases of test_context_parallel.py, for the test and for the processes that it starts."""

from dataclasses import dataclass

import torch

from cuattn.integrations.context_parallel import shard_bounds


@dataclass(frozen=True)
class Case:
    """``given``: ranks know the bounds, they need not tell each other; ``shift``: cuts so far off a chunk's start."""

    keys: int
    rows: int = 3
    mask: str = "full"
    layout: str = "bhsd"
    dtype: torch.dtype = torch.float32
    scale: float | None = None
    batch: int = 2
    given: bool = False
    shift: int = 0

    def inputs(self) -> tuple[torch.Tensor, ...]:
        """q of 4 heads, k and v of 2, with head dims 16 and 24."""
        generator = torch.Generator().manual_seed(self.keys)
        shapes = ((4, self.rows, 16), (2, self.keys, 16), (2, self.keys, 24))
        arrays = (torch.randn(self.batch, *shape, generator=generator).to(self.dtype) for shape in shapes)
        return tuple(x if self.layout == "bhsd" else x.transpose(1, 2).contiguous() for x in arrays)

    def cuts(self, size: int) -> list[tuple[int, int]]:
        cuts = [end + self.shift for _, end in shard_bounds(self.keys, size)[:-1]]
        return list(zip([0, *cuts], [*cuts, self.keys], strict=True))


CASES = {
    "full": Case(2300),
    "causal": Case(2300, rows=600, mask="causal", batch=1),
    "bfloat16": Case(3500, mask="causal", dtype=torch.bfloat16, scale=-0.3),
    "bshd": Case(1100, mask="causal", layout="bshd", dtype=torch.float16),
    "given": Case(1700, mask="causal", given=True),
    "one row": Case(1700, rows=1, mask="causal", batch=1),
    "ranks without keys": Case(700),
    "one key": Case(1, mask="causal"),
    "no keys": Case(0),
    "no rows": Case(1100, rows=0),
    "off a chunk's start": Case(2300, shift=1),
    "off a chunk's start, given": Case(2300, shift=-128, given=True),
}
