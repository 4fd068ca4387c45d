"""Attention on a GPU: every implementation on the same inputs in one run, forward and backward.

Implementations take turns (see `timing`). The backward is `torch.autograd.grad` through the public
function. TFLOP/s use the count of the FlashAttention papers: 4 B H N M D forward, half of it if
causal, 2.5 times that backward.
Run on a GPU: `PYTHONPATH=.:kernels python benchmarks/attention_gpu.py --out results.json`.
"""

import argparse
import json
import subprocess
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from timing import in_turns
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from flashpatch_kernels import attention

Attend = Callable[[Tensor, Tensor, Tensor, bool], Any]


def sdpa(backend: SDPBackend) -> Attend:
    """PyTorch's attention, held to one of its kernels."""

    def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        with sdpa_kernel([backend]):
            grouped = q.shape[1] != k.shape[1]
            return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)

    return attend


def flex() -> Attend:
    """PyTorch's compiled FlexAttention."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    masks: dict[tuple[int, int], Any] = {}

    def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        size = (q.shape[2], k.shape[2])
        if causal and size not in masks:
            masks[size] = create_block_mask(
                lambda b, h, i, j: i >= j,  # noqa: ARG005
                None,
                None,
                *size,
                device="cuda",
            )
        mask = masks[size] if causal else None
        return compiled(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])

    return attend


def flashpatch(engine: str | None = None) -> Attend:
    """Ours, on the engine that is chosen for the call or on the one that is named."""
    return lambda q, k, v, causal: attention(q, k, v, causal=causal, engine=engine)


IMPLEMENTATIONS: dict[str, Callable[[], Attend]] = {
    "sdpa flash2": lambda: sdpa(SDPBackend.FLASH_ATTENTION),
    "sdpa cudnn": lambda: sdpa(SDPBackend.CUDNN_ATTENTION),
    "flex": flex,
    "flashpatch": flashpatch,
    "flashpatch triton": lambda: flashpatch("triton"),
}


def measure(
    attends: dict[str, Attend], *, d: int, n: int, group: int, causal: bool, rounds: int
) -> dict[str, dict[str, float]]:
    """Times and rates of one shape: hidden size 2048, 16k tokens, bf16."""
    heads, batch = 2048 // d, max(1, 16384 // n)
    torch.manual_seed(0)

    def tensor(h: int) -> Tensor:
        return torch.randn(batch, n, h, d, device="cuda", dtype=torch.bfloat16).transpose(1, 2)

    q, k, v, dout = tensor(heads), tensor(heads // group), tensor(heads // group), tensor(heads)
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    operations = 4 * batch * heads * n * n * d / (2 if causal else 1)

    def forward(attend: Attend) -> Callable[[], Any]:
        return lambda: attend(q, k, v, causal)

    def backward(attend: Attend) -> Callable[[], Any]:
        out = attend(q, k, v, causal)
        return lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)

    ms = {}
    for name, of in (("forward", forward), ("backward", backward)):
        functions = {implementation: of(attend) for implementation, attend in attends.items()}
        with torch.set_grad_enabled(name == "backward"):
            ms[name] = in_turns(functions, rounds)
    return {
        implementation: {
            "forward_ms": round(ms["forward"][implementation], 4),
            "backward_ms": round(ms["backward"][implementation], 4),
            "forward_tflops": round(operations / ms["forward"][implementation] / 1e9, 1),
            "backward_tflops": round(2.5 * operations / ms["backward"][implementation] / 1e9, 1),
        }
        for implementation in attends
    }


def commit() -> str:
    """The commit of the code that runs, where git is there to say."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--impls", nargs="*", default=["sdpa flash2", "sdpa cudnn", "flashpatch"])
    parser.add_argument("--dims", type=int, nargs="*", default=[64, 128])
    parser.add_argument("--lengths", type=int, nargs="*", default=[2048, 8192, 16384])
    parser.add_argument("--groups", type=int, nargs="*", default=[1])
    parser.add_argument("--rounds", type=int, default=10, help="how often each has a turn")
    parser.add_argument("--commit", default=commit())
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--deterministic",
        action="store_true",
        help="those of torch's algorithms; cuDNN has none, so without it in --impls",
    )
    arguments = parser.parse_args()
    torch.use_deterministic_algorithms(arguments.deterministic)
    implementations = {name: IMPLEMENTATIONS[name]() for name in arguments.impls}
    rows: list[dict[str, Any]] = []
    record = {
        "what": "attention, bf16, hidden size 2048, 16384 tokens; medians of rounds in turns",
        "card": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": arguments.commit,
        "deterministic": arguments.deterministic,
        "rows": rows,
    }
    for d, n, group, causal in product(
        arguments.dims, arguments.lengths, arguments.groups, (False, True)
    ):
        shape = {"d": d, "n": n, "group": group, "causal": causal}
        found = measure(implementations, **shape, rounds=arguments.rounds)
        for name, times in found.items():
            rows.append({"implementation": name, **shape, **times})
            print(json.dumps(rows[-1]), flush=True)
        if arguments.out:  # what is measured is not lost if the rest is
            arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
