"""Adds a bias of one's own, in Triton: a * tanh((j - i) / b), with an a and a b for each head.

python examples/score_function.py                     # on a GPU
TRITON_INTERPRET=1 python examples/score_function.py  # without one: small, and slow

It compares output and gradients with the same bias as a matrix, and then trains a layer whose heads
look at the distances that the bias tells them to.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

import flashpatch
from flashpatch_kernels import Score


@triton.jit
def add_tanh(s, i, j, batch, head, arguments):
    a = tl.load(arguments[0] + head)
    b = tl.load(arguments[1] + head)
    return s + a * (2 * tl.sigmoid(2 * (j - i) / b) - 1)


def matrix(a: Tensor, b: Tensor, length: int) -> Tensor:
    """The same as a bias [1, heads, length, length]."""
    place = torch.arange(length, device=a.device)
    distance = place - place[:, None]
    return (a[:, None, None] * torch.tanh(distance / b[:, None, None]))[None]


def causal(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    out = flashpatch.attention(q, k, v, causal=True, **options)
    assert isinstance(out, Tensor)  # and not the log-sum-exp beside it
    return out


def compare(score: Score, length: int, dtype: torch.dtype):
    a, b = score.arguments
    shape = (2, len(a), length, 64)
    *inputs, dout = (torch.randn(shape, device=a.device, dtype=dtype) for _ in range(4))
    q, k, v = (x.requires_grad_() for x in inputs)
    # of the same numbers in float32: what differs is rounding
    exact = [x.detach().float().requires_grad_() for x in inputs]
    out = causal(q, k, v, score=score)
    expected = causal(*exact, bias=matrix(a, b, length), engine="tiled")
    found = (out, *torch.autograd.grad(out, inputs, dout))
    true = (expected, *torch.autograd.grad(expected, exact, dout.float()))
    for name, x, y in zip(("output", "dq", "dk", "dv"), found, true, strict=True):
        print(f"largest difference of {name:6} {(x - y).abs().max() / y.abs().max():.0e}")


class Layer(nn.Module):
    """Attention whose scores go through the function; q, k and v are learnt through it."""

    def __init__(self, width: int, score: Score):
        super().__init__()
        self.score = score
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """What each place of x [batch, length, width] sees of those up to it."""
        heads = len(self.score.arguments[0])
        q, k, v = self.qkv(x).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(causal(q, k, v, score=self.score).transpose(1, 2).flatten(2))


def train(score: Score, length: int, steps: int):
    """Learns to say the mean of what was said in the last few places."""
    device = score.arguments[0].device
    layer = Layer(64, score).to(device)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    for step in range(1, steps + 1):
        x = torch.randn(2, length, 64, device=device)
        recent = nn.functional.pad(x.mT, (3, 0)).unfold(2, 4, 1).mean(-1).mT
        loss = nn.functional.mse_loss(layer(x), recent)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 1 or step % 10 == 0:
            print(f"step {step:4d}  loss {loss.item():.4f}")


def main():
    gpu = torch.cuda.is_available()
    if not gpu and os.environ.get("TRITON_INTERPRET") != "1":
        raise SystemExit("no GPU: run it with TRITON_INTERPRET=1")
    torch.manual_seed(0)
    a = torch.tensor([8.0, 4.0], device="cuda" if gpu else "cpu")
    b = torch.tensor([3.0, 20.0], device=a.device)
    score = Score(add_tanh, arguments=(a, b))
    compare(score, 2048 if gpu else 40, torch.bfloat16 if gpu else torch.float32)
    train(score, 512 if gpu else 40, 100 if gpu else 20)


if __name__ == "__main__":
    main()
