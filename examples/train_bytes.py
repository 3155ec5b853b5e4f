"""A small byte-level transformer trained on this repository's own text, and what batch invariance means for it.

    python examples/train_bytes.py
    python examples/train_bytes.py --device cuda --dtype bfloat16 --sequence-length 512 --steps 200

Two layers; attention in --dtype, all else in float32. The loss has to fall. In a step more each call of attention is
recorded: q, k, v, the output, its log-sum-exp, and the gradients that autograd brings to them and takes from them. Then
every sequence is computed alone, forward and backward, from the recorded q, k, v and gradient of the output. All of its
results must have the bits that they had in the batch. (It starts from recorded tensors because torch's linear layers
are not batch-invariant: in a run of its own the sequence would have another q.)

A comparison that cannot fail shows nothing. So it must find a single bit that is changed, and an attention whose sums
are taken relative to something that depends on the batch. What it finds about torch's own attention is only shown: that
depends on device and shapes.
"""

import argparse
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import cuattn
from cuattn.testing import BitwiseMismatch, assert_bitwise_equal

ROOT = Path(__file__).resolve().parents[1]
LAYERS, HEADS, KV_HEADS, HEAD_DIM = 2, 4, 2, 32
WIDTH = HEADS * HEAD_DIM
BATCH = 8
#: The mean of the last losses is to be below this share of the first.
LARGEST_SHARE, LAST = 0.8, 5

Results = dict[str, Tensor]  # by name, of a batch of sequences
#: (q, k, v), each (B, L, H, D), to the output and the LSE, which may be None.
AttentionFunction = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Recorded:
    """A call of attention in training; q, k, v and out keep their gradients."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor

    @classmethod
    def of(cls, *tensors: Tensor) -> "Recorded":
        recorded = cls(*tensors)
        for tensor in (recorded.q, recorded.k, recorded.v, recorded.out):
            tensor.retain_grad()
        return recorded

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v and the gradient of the output."""
        return self.q.detach(), self.k.detach(), self.v.detach(), self.out.grad

    @property
    def results(self) -> Results:
        values = self.out, self.lse, self.q.grad, self.k.grad, self.v.grad
        return {name: x.detach() for name, x in zip(("out", "lse", "dq", "dk", "dv"), values, strict=True)}


def batch_invariant(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return cuattn.attention(q, k, v, mask="causal", layout="bshd", return_lse=True)


def torch_sdpa(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None]:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2), None


def batch_dependent(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None]:
    """Right up to rounding, but exponentials are taken relative to a number that depends on the batch."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    query, key, value = (x.transpose(1, 2).float() for x in (q, k, v))
    scores = q.shape[3] ** -0.5 * (query @ key.mT)
    scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    weights = (scores - scores.detach().amax(-1, keepdim=True) - 0.1 * q.shape[0]).exp()
    out = weights.to(q.dtype).float() @ value / weights.sum(-1, keepdim=True)
    return out.transpose(1, 2).to(q.dtype), None


class Layer(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.q, self.k, self.v = (nn.Linear(WIDTH, heads * HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
        self.out = nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor, record: list[Recorded] | None) -> Tensor:
        normed = self.norms[0](x)
        q, k, v = (f(normed).unflatten(-1, (-1, HEAD_DIM)).to(self.dtype) for f in (self.q, self.k, self.v))
        out, lse = batch_invariant(q, k, v)
        if record is not None:
            record.append(Recorded.of(q, k, v, out, lse))
        x = x + self.out(out.flatten(2).float())
        return x + self.mlp(self.norms[1](x))


class Model(nn.Module):
    def __init__(self, length: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, WIDTH), nn.Embedding(length, WIDTH)
        self.layers = nn.ModuleList(Layer(dtype) for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256)

    def loss(self, text: Tensor, record: list[Recorded] | None = None) -> Tensor:
        """The sum over all bytes of each sequence but the first; text (B, L + 1)."""
        given, expected = text[:, :-1], text[:, 1:]
        x = self.bytes(given) + self.places.weight[: given.shape[1]]
        for layer in self.layers:
            x = layer(x, record)
        return nn.functional.cross_entropy(self.head(self.norm(x)).flatten(0, 1), expected.flatten(), reduction="sum")


class Text:
    """Random pieces of the documentation."""

    def __init__(self, length: int, seed: int) -> None:
        files = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
        self.bytes = torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)
        self.length, self.random = length, torch.Generator().manual_seed(seed)

    def batch(self) -> Tensor:
        starts = torch.randint(len(self.bytes) - self.length, (BATCH, 1), generator=self.random)
        return self.bytes[starts + torch.arange(self.length + 1)].long()


def train(model: Model, text: Text, steps: int, device: str) -> list[float]:
    """The loss of each step, nats a byte."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = model.loss(text.batch().to(device))
        loss.backward()
        optimizer.step()
        losses.append(loss.item() / (BATCH * text.length))
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step:4}: {losses[-1]:.3f} nats a byte", flush=True)
    return losses


def compute(attention: AttentionFunction, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> Results:
    """Forward and backward."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = attention(*leaves)
    results = {"out": out.detach()} if lse is None else {"out": out.detach(), "lse": lse.detach()}
    return results | dict(zip(("dq", "dk", "dv"), torch.autograd.grad(out, leaves, dout), strict=True))


def compare(attention: AttentionFunction, calls: Sequence[Recorded], whole: Sequence[Results]) -> tuple[int, list[str]]:
    """(arrays compared, which have other bits): each sequence alone beside its part of ``whole``, of each call."""
    count, different = 0, []
    for (layer, call), sequence in itertools.product(enumerate(calls), range(BATCH)):
        one = slice(sequence, sequence + 1)
        alone = compute(attention, *(x[one] for x in call.inputs))
        for name, array in alone.items():
            count += 1
            try:
                assert_bitwise_equal(array, whole[layer][name][one], f"layer {layer}, sequence {sequence}, {name}")
            except BitwiseMismatch as mismatch:
                different.append(str(mismatch))
    return count, different


def with_another_bit(results: Results) -> Results:
    """A copy in which the lowest bit of one element of dk differs."""
    changed = results["dk"].clone()
    changed.view(torch.int16 if changed.itemsize == 2 else torch.int32)[BATCH // 2, -1, 0, 0] ^= 1
    return results | {"dk": changed}


def require(holds: bool, what: str) -> None:
    print(f"{'yes' if holds else 'NO':3} {what}", flush=True)
    if not holds:
        raise AssertionError(what)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="(default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="of attention")
    parser.add_argument("--sequence-length", type=int, default=128, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    torch.manual_seed(options.seed)
    text = Text(options.sequence_length, options.seed)
    model = Model(options.sequence_length, getattr(torch, options.dtype)).to(options.device)
    print(f"{len(text.bytes)} bytes; attention on {options.device} in {options.dtype}", flush=True)
    losses = train(model, text, options.steps, options.device)
    last = sum(losses[-LAST:]) / len(losses[-LAST:])
    require(last < LARGEST_SHARE * losses[0], f"the loss falls: {losses[0]:.3f} to {last:.3f}")

    calls: list[Recorded] = []
    model.loss(text.batch().to(options.device), calls).backward()
    recorded = [call.results for call in calls]
    count, different = compare(batch_invariant, calls, recorded)
    require(not different, f"{count - len(different)} of {count} arrays of single sequences have the batch's bits")
    _, found = compare(batch_invariant, calls, [with_another_bit(recorded[0]), *recorded[1:]])
    require(len(found) == 1, f"one changed bit is found: {'; '.join(found) or 'nothing'}")
    whole = [compute(batch_dependent, *call.inputs) for call in calls]
    count, different = compare(batch_dependent, calls, whole)
    require(
        bool(different), f"a batch-dependent attention is found: {len(different)} of {count} arrays have other bits"
    )
    count, different = compare(torch_sdpa, calls, [compute(torch_sdpa, *call.inputs) for call in calls])
    print(f"    torch's scaled_dot_product_attention: {len(different)} of {count} arrays have other bits")


if __name__ == "__main__":
    main()
