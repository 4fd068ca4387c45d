"""What each term of a score costs on a GPU, and what the same costs with PyTorch's own attention.

* `terms`: two rows of 8192 tokens, hidden size 2048, bf16: the Triton engine with a term, over the
  same call without it. A table, a bias or sinks with `learnt` take a gradient.
* `t5`: T5's bucketed position bias with a gradient, B4 H16 N2048 D64, and the same call without it,
  beside FlexAttention with a score_mod and PyTorch's attention with a dense bias.
* `padded`: a causal batch of 8 texts of 512 to 4096 tokens, 32 query heads on 8 key heads, beside
  PyTorch's attention with a boolean mask. Texts are padded on the right, but where it is said.
* `hopper`: what the Hopper engine's own terms cost, tokens as in `terms`.

Times are of forward alone, and of forward and backward together; the cases that are compared take
turns (see `timing`).
Run on a GPU: `PYTHONPATH=.:kernels python benchmarks/terms_gpu.py --out results.json`; `--dry` runs
every case once, in small, without a GPU.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from flashpatch_kernels.masks import Band, Boolean, Intervals, Mask, intersect, key_mask
from flashpatch_kernels.op import run
from flashpatch_kernels.options import Options


class Machine(NamedTuple):
    """Where cases run: a GPU at full size, or a CPU in small."""

    device: str
    engine: str
    dtype: torch.dtype
    shrink: int


GPU = Machine("cuda", "triton", torch.bfloat16, 1)
CPU = Machine("cpu", "tiled", torch.float32, 64)


class Case(NamedTuple):
    """Something to time: a forward, and the tensors to differentiate it by."""

    name: str
    forward: Callable[[], Tensor]
    inputs: tuple[Tensor, ...]


def tensors(
    on: Machine, batch: int, heads: int, kv_heads: int, n: int, d: int
) -> tuple[Tensor, ...]:
    """Random q, k and v, as a projection lays them out."""
    torch.manual_seed(0)
    return tuple(
        torch.randn(batch, n, h, d, device=on.device, dtype=on.dtype)
        .transpose(1, 2)
        .requires_grad_()
        for h in (heads, kv_heads, kv_heads)
    )


def ours(
    name: str, on: Machine, qkv: tuple[Tensor, ...], learnt: tuple[Tensor, ...] = (), **options: Any
) -> Case:
    """Our engine on these tensors, or on a GPU the one that `options` name."""
    named = options.pop("engine", on.engine)
    engine = named if on.device == "cuda" else on.engine
    scale = options.pop("scale", qkv[0].shape[3] ** -0.5)
    record = Options(scale=scale, **options)
    q, k, v = qkv
    return Case(name, lambda: run(q, k, v, record, engine)[0], (*qkv, *learnt))


def terms(on: Machine, d: int, *, causal: bool) -> Iterator[Case]:
    """One call for each term, the first without any."""
    heads, n = 2048 // d, 8192 // on.shrink
    qkv = tensors(on, 2, heads, heads, n, d)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=on.device)

    mask: Mask = Band(right=0) if causal else Band()
    seed = torch.tensor([1], device=on.device)
    half = random(1, heads, n, n).to(on.dtype)
    seen = torch.rand(n // 128 or 1, n // 128 or 1, device=on.device) < 0.05
    tiles = seen.repeat_interleave(128, 0).repeat_interleave(128, 1)[:n, :n].contiguous()
    options: dict[str, tuple[dict[str, Any], str | None]] = {
        "none": ({}, None),
        "softcap": ({"softcap": 50.0}, None),
        "sinks": ({"sinks": random(heads)}, None),
        "sinks, learnt": ({"sinks": random(heads)}, "sinks"),
        "table": ({"table": random(heads, 2 * n - 1)}, None),
        "table, learnt": ({"table": random(heads, 2 * n - 1)}, "table"),
        "slopes": ({"slopes": random(heads)}, None),
        "slopes, learnt": ({"slopes": random(heads)}, "slopes"),
        "table of 257 distances": ({"table": random(heads, 257), "first": -128}, None),
        "table of 257 distances, learnt": ({"table": random(heads, 257), "first": -128}, "table"),
        "key bias": ({"bias": random(2, heads, 1, n)}, None),
        "key bias, learnt": ({"bias": random(2, heads, 1, n)}, "bias"),
        "bias [1, H, N, N]": ({"bias": half}, None),
        "bias [1, H, N, N], learnt": ({"bias": half.clone()}, "bias"),
        "dropout": ({"dropout": 0.1, "seed": seed}, None),
        "boolean, all true": ({"mask": Boolean(torch.ones_like(tiles)[None, None])}, None),
        "boolean, 95% empty": ({"mask": Boolean(tiles[None, None])}, None),
    }
    for name, (more, learnt) in options.items():
        inputs = () if learnt is None else (more[learnt].requires_grad_(),)
        yield ours(name, on, qkv, inputs, **{"mask": mask, **more})
    yield Case(
        "dropout, sdpa",
        lambda: scaled_dot_product_attention(*qkv, dropout_p=0.1, is_causal=causal),
        qkv,
    )


def t5(on: Machine) -> Iterator[Case]:
    """T5's relative position bias: 32 buckets, of distances up to 128."""
    from transformers.models.t5.modeling_t5 import T5Attention

    batch, heads, n, d = 4, 16, 2048 // on.shrink, 64
    qkv = tensors(on, batch, heads, heads, n, d)
    q, k, v = qkv
    weight = torch.randn(32, heads, device=on.device, requires_grad=True)
    near = torch.arange(-128, 129, device=on.device)
    bucket: Any = T5Attention._relative_position_bucket

    def bias(at: Tensor) -> Tensor:
        return weight[bucket(at, bidirectional=True, num_buckets=32, max_distance=128)]

    def layers_own() -> Tensor:
        record = Options(scale=1.0, table=bias(near).T, first=-128)
        return run(q, k, v, record, on.engine)[0]

    given = bias(near).T.detach().requires_grad_()
    yield ours("none", on, qkv, scale=1.0)
    # What each layer of a stack costs: the buckets are looked up once for all of them.
    yield ours("table", on, qkv, (given,), scale=1.0, table=given, first=-128)
    for_hopper: dict[str, Any] = {"scale": 1.0, "engine": "hopper"}
    yield ours("none, hopper", on, qkv, **for_hopper)
    yield ours("table, hopper", on, qkv, (given,), table=given, first=-128, **for_hopper)
    yield Case("table from buckets", layers_own, (*qkv, weight))
    i = torch.arange(n, device=on.device)

    def dense() -> Tensor:
        added = bias(i[None] - i[:, None]).permute(2, 0, 1)[None].to(q.dtype)
        return scaled_dot_product_attention(q, k, v, attn_mask=added, scale=1.0)

    yield Case("sdpa, dense bias", dense, (*qkv, weight))
    if on.device == "cuda":
        from torch.nn.attention.flex_attention import flex_attention

        compiled = torch.compile(flex_attention, dynamic=False)
        distance = torch.arange(1 - n, n, device=on.device)
        # Its own choice of tiles does not fit the card's memory.
        names = ("BLOCK_M", "BLOCK_N", "BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2")
        small: Any = dict.fromkeys(names, 32) | {"num_stages": 1}
        buckets = bucket(distance, bidirectional=True, num_buckets=32, max_distance=128)

        def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:  # noqa: ARG001
            return s + weight[buckets[j - i + n - 1], h]

        yield Case(
            "flex, score_mod",
            lambda: compiled(q, k, v, score_mod=score, scale=1.0, kernel_options=small),
            (*qkv, weight),
        )


def padded(on: Machine) -> Iterator[Case]:
    """A causal batch of texts of several lengths."""
    n, d = 4096 // on.shrink, 128
    qkv = tensors(on, 8, 32, 8, n, d)
    q, k, v = qkv
    lengths = torch.linspace(n / 8, n, 8, device=on.device).long()
    place = torch.arange(n, device=on.device)
    visible = place < lengths[:, None]
    mask = intersect(key_mask(visible), Band(right=0), n, n, on.device)
    yield ours("intervals", on, qkv, mask=mask)
    left = intersect(key_mask(place >= n - lengths[:, None]), Band(right=0), n, n, on.device)
    yield ours("intervals, padded on the left", on, qkv, mask=left)
    yield ours("intervals, hopper", on, qkv, mask=mask, engine="hopper")
    yield ours("intervals, padded on the left, hopper", on, qkv, mask=left, engine="hopper")
    assert isinstance(mask, Intervals)
    packed = Intervals(mask.bounds.masked_fill(~visible[..., None], 0), mask.runs)
    yield ours("intervals, padded queries hidden", on, qkv, mask=packed)
    lower = torch.ones(n, n, dtype=torch.bool, device=on.device).tril()
    allowed = lower & visible[:, None, None]
    yield ours("boolean", on, qkv, mask=Boolean(allowed))
    yield Case(
        "sdpa, boolean",
        lambda: scaled_dot_product_attention(q, k, v, attn_mask=allowed, enable_gqa=True),
        qkv,
    )


def hopper(on: Machine, d: int, *, causal: bool) -> Iterator[Case]:
    """One call for each term of the Hopper engine, the first without any."""
    heads, n = 2048 // d, 8192 // on.shrink
    qkv = tensors(on, 2, heads, heads, n, d)

    def learnt(*shape: int) -> Tensor:
        return torch.randn(shape, device=on.device, requires_grad=True)

    sinks, bias, entries = learnt(heads), learnt(2, heads, 1, n), learnt(heads, 257)
    options: dict[str, Any] = {"mask": Band(right=0) if causal else Band(), "engine": "hopper"}
    yield ours("none", on, qkv, **options)
    yield ours("softcap", on, qkv, softcap=50.0, **options)
    slopes = torch.exp2(-8 * torch.arange(1, heads + 1, device=on.device) / heads)
    yield ours("slopes", on, qkv, slopes=slopes, **options)
    yield ours("sinks, learnt", on, qkv, (sinks,), sinks=sinks, **options)
    yield ours("key bias", on, qkv, bias=bias.detach(), **options)
    yield ours("key bias, learnt", on, qkv, (bias,), bias=bias, **options)
    some: dict[str, Any] = {"first": -128, **options}
    yield ours("table of 257 distances", on, qkv, table=entries.detach(), **some)
    yield ours("table of 257 distances, learnt", on, qkv, (entries,), table=entries, **some)
    yield ours("table", on, qkv, table=torch.randn(heads, 2 * n - 1, device=on.device), **options)


def groups(on: Machine) -> Iterator[tuple[str, Iterator[Case]]]:
    """All cases, by what they are compared with: the first of each group."""
    yield "t5", t5(on)
    yield "padded", padded(on)
    for d in (64, 128, 256):
        for causal in (False, True):
            yield f"hopper, d {d}, {'causal' if causal else 'full'}", hopper(on, d, causal=causal)
    for d in (64, 128):
        for causal in (False, True):
            yield f"terms, d {d}, {'causal' if causal else 'full'}", terms(on, d, causal=causal)


class Passes(NamedTuple):
    """The two things to time of a case, under the names that results have for them."""

    forward_ms: Callable[[], Any]
    both_ms: Callable[[], Any]

    @staticmethod
    def of(case: Case) -> "Passes":
        """Each runs once, which may compile, and may show that there is no memory for it."""
        dout = torch.randn_like(case.forward().detach())

        def forward() -> Tensor:
            with torch.no_grad():
                return case.forward()

        def both() -> tuple[Tensor, ...]:
            return torch.autograd.grad(case.forward(), case.inputs, dout)

        forward()
        both()
        return Passes(forward, both)


def measured(cases: Iterator[Case], on: Machine, rounds: int) -> list[dict[str, Any]]:
    """A row for each case, with times and their ratios to the first one's, or with its error."""
    passes: dict[str, Passes] = {}
    rows: list[dict[str, Any]] = []
    for case in cases:
        rows.append({"case": case.name})
        try:
            passes[case.name] = Passes.of(case)
        except (RuntimeError, ValueError) as error:
            if on.device == "cpu":
                raise
            rows[-1]["error"] = str(error)[:200]
    if on.device == "cpu" or not passes:
        return rows
    from timing import in_turns

    first = next(iter(passes))
    for name in Passes._fields:
        ms = in_turns({case: getattr(both, name) for case, both in passes.items()}, rounds)
        for row in rows:
            if row["case"] in ms:
                row[name] = round(ms[row["case"]], 4)
                row[name.replace("_ms", "_ratio")] = round(ms[row["case"]] / ms[first], 3)
    return rows


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10, help="how often each has a turn")
    parser.add_argument("--commit", default="unknown", help="of the code that runs")
    parser.add_argument("--only", default="", help="groups whose name contains this")
    parser.add_argument("--dry", action="store_true", help="once, in small, on a CPU")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    on = CPU if arguments.dry else GPU
    rows: list[dict[str, Any]] = []
    record: dict[str, Any] = {
        "what": __doc__,
        "card": "none" if arguments.dry else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "commit": arguments.commit,
        "rows": rows,
    }
    for group, cases in groups(on):
        if arguments.only not in group:
            continue
        for row in measured(cases, on, arguments.rounds):
            rows.append({"group": group, **row})
            print(json.dumps(rows[-1]), flush=True)
        if arguments.out:  # what is measured is not lost if the rest is
            arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
