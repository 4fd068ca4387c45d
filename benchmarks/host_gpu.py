"""What the host takes for a call before the GPU begins, beside PyTorch's own attention.

Microseconds of one alike call after another, of tensors so small that the GPU never is behind, the
least of several rounds: a host that others share is slower at times. Forward without gradients,
forward with them, and backward through autograd; of the engine alone what it takes of these.
Run on a GPU: `PYTHONPATH=.:kernels python benchmarks/host_gpu.py --out results.json`; `--dry` runs
every case once, without a GPU.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from flashpatch_kernels import attention
from flashpatch_kernels.masks import Band
from flashpatch_kernels.options import Options

SIZES = (1, 320, 4, 64)  # row of the batch, tokens, heads, head size


class Implementation(NamedTuple):
    """A way of computing causal attention, and what holds it to one, which is not timed."""

    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    within: Callable[[], AbstractContextManager[Any]] = nullcontext


def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The public function, on the engine that it chooses."""
    out = attention(q, k, v, causal=True)
    assert isinstance(out, Tensor)
    return out


def theirs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's."""
    return scaled_dot_product_attention(q, k, v, is_causal=True)


IMPLEMENTATIONS = {
    "flashpatch": Implementation(ours),
    "sdpa flash2": Implementation(theirs, lambda: sdpa_kernel([SDPBackend.FLASH_ATTENTION])),
    "sdpa cudnn": Implementation(theirs, lambda: sdpa_kernel([SDPBackend.CUDNN_ATTENTION])),
}


def tensors(device: str) -> list[Tensor]:
    """q, k, v and the gradient of the output."""
    batch, n, heads, d = SIZES
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    rows = [torch.randn(batch, n, heads, d, device=device, dtype=dtype) for _ in range(4)]
    return [x.transpose(1, 2) for x in rows]


def engine_calls(device: str) -> Iterator[Any]:
    """Name and call of what the public function, and autograd, have the engine do."""
    engine = import_module(f"flashpatch_kernels.{'hopper' if device == 'cuda' else 'tiled'}")
    *qkv, dout = tensors(device)
    options = Options(mask=Band(right=0), scale=SIZES[-1] ** -0.5)
    out, lse = engine.forward(*qkv, options)
    needs = frozenset("qkv")
    yield "forward_us", lambda: engine.forward(*qkv, options)
    yield "backward_us", lambda: engine.backward(dout, None, *qkv, out, lse, options, needs)


def calls(attend: Callable[[Tensor, Tensor, Tensor], Tensor], device: str) -> Iterator[Any]:
    """Name and call of each thing to time."""
    *plain, dout = tensors(device)
    qkv = [x.detach().requires_grad_() for x in plain]
    out = attend(*qkv)
    yield "forward_us", lambda: attend(*plain)
    yield "forward_with_gradients_us", lambda: attend(*qkv)
    yield "backward_us", lambda: torch.autograd.grad(out, qkv, dout, retain_graph=True)


def least_us(call: Callable[[], Any], repeats: int, rounds: int) -> float:
    """Microseconds of a call, the least mean of so many repeats."""
    taken = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        taken.append((time.perf_counter() - start) / repeats * 1e6)
    return min(taken)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=300, help="calls of a round")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--commit", default="unknown", help="of the code that runs")
    parser.add_argument("--dry", action="store_true", help="once, on a CPU, ours alone")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    device = "cpu" if arguments.dry else "cuda"
    todo = [("flashpatch, its engine", nullcontext, engine_calls(device))]
    todo += [
        (name, within, calls(attend, device))
        for name, (attend, within) in IMPLEMENTATIONS.items()
        if not (arguments.dry and attend is theirs)
    ]
    for name, within, timed in todo:
        rows.append({"implementation": name})
        with within():
            for what, call in timed:
                call()  # may compile
                if not arguments.dry:
                    found = least_us(call, arguments.repeats, arguments.rounds)
                    rows[-1][what] = round(found, 1)
        print(json.dumps(rows[-1]), flush=True)
    if arguments.out:
        record: dict[str, Any] = {
            "what": __doc__,
            "card": "none" if arguments.dry else torch.cuda.get_device_name(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "commit": arguments.commit,
            "rows": rows,
        }
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
