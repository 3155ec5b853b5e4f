"""Problem: a checked call in the one form that backends and the schedule know."""

from dataclasses import dataclass, replace

from cuattn.interop import Tensor

#: Axes of the caller's arrays: batch, heads, sequence, head dim; or, packed, tokens, heads, head dim.
LAYOUTS = ("bhsd", "bshd")
PACKED = "thd"


@dataclass(frozen=True)
class Sequences:
    """Lengths and places that only the device need know: contiguous int32 arrays on the tensors' device.

    query_starts, key_starts: (count + 1), cumulative lengths of packed queries and keys.
    key_lengths: (count), how many keys of each sequence exist, from its first on.
    cached: the keys are a cache's, and the causal diagonal ends at each sequence's last key; else it ends at the last
        place for a key, whether key_lengths reach it or not.
    new_keys: key_lengths count the keys before the call's own, of which each sequence has as many as queries.
    block_table: (count, pages of a sequence): page p of sequence s holds its keys p * page_size and following.
    """

    count: int
    query_starts: Tensor | None = None
    key_starts: Tensor | None = None
    key_lengths: Tensor | None = None
    cached: bool = False
    new_keys: bool = False
    block_table: Tensor | None = None

    @property
    def arrays(self) -> dict[str, Tensor]:
        named = {
            "cu_seqlens_q": self.query_starts,
            "cu_seqlens_k": self.key_starts,
            "key_lengths": self.key_lengths,
            "block_table": self.block_table,
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}


@dataclass(frozen=True)
class Append:
    """New keys and values (batch, key head, token, column), to be written into the cache behind each sequence's."""

    key: Tensor
    value: Tensor


@dataclass(frozen=True)
class Problem:
    """All tensors have the axes (batch, head, token, column), whatever the caller's layout; packed: batch 1.

    A paged cache has the axes (page, head, token of the page, column). key_padding_mask is (batch, key length) of bool:
    key j of batch entry b exists where it is True.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: str
    scale: float
    layout: str
    sequences: Sequences | None = None
    key_padding_mask: Tensor | None = None
    append: Append | None = None
    num_splits: int | None = None

    @property
    def batch(self) -> int:
        return self.query.shape[0]

    @property
    def query_heads(self) -> int:
        return self.query.shape[1]

    @property
    def key_heads(self) -> int:
        return self.key.shape[1]

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.query_heads // max(1, self.key_heads)

    @property
    def query_length(self) -> int:
        """Rows of each sequence; packed: of all together."""
        return self.query.shape[2]

    @property
    def paged(self) -> bool:
        return self.sequences is not None and self.sequences.block_table is not None

    @property
    def key_length(self) -> int:
        """Keys of each sequence, of a cache its capacity; packed: of all together."""
        if self.sequences and self.sequences.block_table:
            return self.sequences.block_table.shape[1] * self.page_size
        return self.key.shape[2]

    @property
    def page_size(self) -> int:
        return self.key.shape[2]

    @property
    def head_dim(self) -> int:
        return self.query.shape[3]

    @property
    def value_dim(self) -> int:
        """Columns of a value and of the output."""
        return self.value.shape[3]

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Shape of the output in the caller's layout."""
        return caller_shape((*self.query.shape[:3], self.value_dim), self.layout)

    @property
    def lse_shape(self) -> tuple[int, ...]:
        return self.query.shape[1:3] if self.layout == PACKED else self.query.shape[:3]


@dataclass(frozen=True)
class Upstream:
    """What a backward pass takes besides a Problem without append and block table.

    out: what attention returned, and dout, the gradient of it, in the axes of the query. lse: its LSE, and dlse, the
    gradient of it or None: contiguous (batch, head, token) of float32.
    """

    out: Tensor
    lse: Tensor
    dout: Tensor
    dlse: Tensor | None = None

    @property
    def arrays(self) -> dict[str, Tensor]:
        named = {"out": self.out, "lse": self.lse, "dout": self.dout, "dlse": self.dlse}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


@dataclass(frozen=True)
class Gradients:
    """What a backward pass fills: gradients of queries, keys and values, in the axes of these."""

    query: Tensor
    key: Tensor
    value: Tensor


def caller_shape(shape: tuple[int, ...], layout: str) -> tuple[int, ...]:
    """A shape (batch, head, token, column) in the caller's layout."""
    batch, heads, tokens, columns = shape
    return {
        "bhsd": (batch, heads, tokens, columns),
        "bshd": (batch, tokens, heads, columns),
        PACKED: (tokens, heads, columns),
    }[layout]


def in_kernel_axes(tensor: Tensor, layout: str) -> Tensor:
    """The same memory with the axes (batch, head, token, column)."""

    def ordered(sizes: tuple[int, ...], batch: int) -> tuple[int, ...]:
        if layout == "bhsd":
            return sizes
        *first, tokens, heads, columns = sizes
        return (*(first or [batch]), heads, tokens, columns)

    return replace(tensor, shape=ordered(tensor.shape, 1), strides=ordered(tensor.strides, 0))
