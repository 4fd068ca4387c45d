"""Times of the Triton kernels with candidate tiles, from which the table in `tuning` was filled.

Every candidate is compiled first, by many processes at once; then each kernel is timed alone.
Run on a GPU: `PYTHONPATH=.:kernels python benchmarks/triton_tiles.py --out tiles.json`.
"""

import argparse
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.testing import do_bench

from flashpatch_kernels import tuning
from flashpatch_kernels.masks import Band
from flashpatch_kernels.options import Options
from flashpatch_kernels.triton import backward, forward, launching, plans, setups
from flashpatch_kernels.tuning import Pass, Tile

# Floating-point operations of a pass, in products of N x M x D.
PRODUCTS: dict[Pass, int] = {"forward": 2, "dkdv": 4, "dk": 3, "dv": 2, "dq": 3}
NEEDS = {"forward": "", "dkdv": "kv", "dk": "k", "dv": "v", "dq": "q"}

# Pass -> head size -> (BM, BN, warps, stages), all read by the bulk copy engine; best first.
HALF: dict[Pass, dict[int, list[tuple[int, int, int, int]]]] = {
    "forward": {
        64: [(64, 128, 4, 2), (64, 128, 4, 3), (128, 64, 4, 4), (64, 64, 4, 4)],
        80: [(128, 64, 8, 3), (64, 64, 4, 3), (64, 128, 4, 2), (128, 64, 4, 3), (64, 64, 4, 2)],
        96: [(64, 64, 4, 2), (128, 64, 4, 2), (128, 64, 4, 3), (64, 64, 4, 3), (64, 128, 4, 2)],
        128: [(128, 64, 4, 2), (64, 64, 4, 3), (128, 32, 4, 2)],
        160: [(64, 64, 4, 2), (128, 64, 8, 2), (128, 64, 8, 3)],
        192: [(128, 64, 8, 2), (128, 64, 8, 3), (128, 32, 8, 3), (64, 32, 4, 3)],
        256: [(128, 64, 8, 2), (128, 32, 8, 3)],
    },
    "dkdv": {
        64: [(64, 64, 4, 3), (64, 64, 4, 4), (64, 128, 8, 4), (32, 64, 4, 4), (64, 128, 8, 3)],
        80: [(64, 64, 4, 3), (64, 128, 8, 3), (32, 128, 8, 3), (32, 64, 4, 4)],
        96: [(64, 64, 4, 3), (64, 128, 8, 3), (32, 128, 8, 3), (32, 64, 4, 4), (64, 64, 4, 2)],
        128: [(64, 128, 8, 3), (64, 64, 4, 2), (32, 64, 4, 3), (32, 64, 4, 4), (32, 128, 8, 4)],
    },
    "dk": {
        160: [(64, 128, 8, 2), (64, 64, 4, 2), (32, 128, 8, 3), (32, 64, 4, 3)],
        192: [(64, 128, 8, 2), (32, 128, 8, 3), (32, 64, 4, 3)],
        256: [(32, 128, 8, 2), (32, 64, 4, 2), (64, 128, 8, 1)],
    },
    "dv": {
        160: [(64, 128, 8, 3), (64, 128, 8, 2), (64, 64, 4, 2), (32, 64, 4, 4)],
        192: [(64, 128, 8, 2), (64, 64, 4, 3), (32, 128, 8, 4), (64, 64, 4, 2)],
        256: [(64, 128, 8, 2), (64, 64, 4, 2), (32, 128, 8, 4)],
    },
    "dq": {
        64: [(64, 64, 4, 3), (128, 64, 4, 3), (64, 64, 4, 4), (128, 64, 4, 4), (64, 32, 4, 4)],
        80: [(64, 64, 4, 3), (64, 64, 4, 2), (128, 64, 8, 3), (64, 32, 4, 4)],
        96: [(64, 64, 4, 3), (64, 64, 4, 2), (128, 64, 8, 3), (64, 32, 4, 4)],
        128: [(128, 64, 8, 3), (64, 64, 4, 2), (64, 32, 4, 3), (64, 32, 4, 4), (128, 64, 8, 4)],
        160: [(128, 64, 8, 2), (64, 32, 4, 3), (128, 32, 8, 4)],
        192: [(128, 64, 8, 2), (128, 32, 8, 2), (128, 32, 8, 3), (64, 32, 4, 2)],
        256: [(128, 32, 8, 2), (128, 64, 8, 1), (128, 32, 8, 3), (64, 16, 4, 3)],
    },
}

# The same for float32 in full precision, which has no tensor cores.
FLOAT: list[tuple[int, int, int, int]] = [
    (32, 32, 4, 1), (32, 32, 8, 1), (64, 32, 8, 1), (64, 64, 8, 1), (16, 32, 4, 1), (32, 16, 4, 1),
    (16, 16, 4, 1),
]  # fmt: skip


class Candidate(NamedTuple):
    """A tile for one pass over a head size."""

    name: Pass
    size: int
    tile: Tile
    dtype: str


def launches_of(
    candidate: Candidate, *, causal: bool, n: int, hidden: int = 2048, run: bool = True
) -> tuple[Any, float]:
    """The kernel launch of a candidate's pass, as a function, and its 10^12 operations."""
    name, size, tile, dtype = candidate
    heads, batch = hidden // size, max(1, 16384 // n)
    torch.manual_seed(0)
    q, k, v, dout = (
        torch.randn(batch, n, heads, size, device="cuda", dtype=getattr(torch, dtype)).transpose(
            1, 2
        )
        for _ in range(4)
    )
    made: dict[str, Any] = {}
    launch, table = launching.launch, tuning.tile

    def chosen(asked: tuning.Question, which: Any) -> Tile:
        return tile if which == name else table(asked, which)

    def keep(kernel: Any, n_programs: int, tile: Tile, *arguments: Any) -> None:
        made[kernel.__name__] = lambda: launch(kernel, n_programs, tile, *arguments)
        if run:
            launch(kernel, n_programs, tile, *arguments)

    options = Options(Band(right=0) if causal else Band(), scale=size**-0.5)
    with (
        mock.patch.object(tuning, "tile", chosen),
        mock.patch.object(setups, "passes", setups.Passes),
        mock.patch.object(plans, "shared", return_value=plans.Plan(kept=False)),
        mock.patch.object(launching, "launch", keep),
    ):
        out, lse = forward(q, k, v, options)
        if NEEDS[name]:
            needs = frozenset(NEEDS[name])
            backward(dout, None, q, k, v, out, lse, options, needs)
    operations = PRODUCTS[name] * 2 * batch * heads * n * n * size / (2 if causal else 1)
    kernel = "dkdv_kernel" if name in ("dk", "dv") else f"{name}_kernel"
    return made[kernel], operations / 1e12


def compile_one(candidate: Candidate) -> None:
    """Compiles a candidate, which leaves it in Triton's cache on disk."""
    with suppress(triton.runtime.errors.OutOfResources):
        launches_of(candidate, causal=True, n=256)[0]()


def time_one(candidate: Candidate, *, causal: bool, n: int, rep: int) -> dict[str, Any]:
    """TFLOP/s of a candidate, from the median time, and what it needs."""
    launch, operations = launches_of(candidate, causal=causal, n=n)
    milliseconds: Any = do_bench(launch, warmup=10, rep=rep, return_mode="median")
    compiled = launch()
    return {
        "causal" if causal else "full": round(operations / milliseconds * 1e3, 1),
        "registers": compiled.n_regs,
        "spills": compiled.n_spills,
        "shared": compiled.metadata.shared,
    }


def candidates_of(dtype: str) -> list[Candidate]:
    """Every candidate for a dtype."""
    if dtype == "float32":
        sizes = {name: (64, 128) if name == "dkdv" else (64, 128, 256) for name in PRODUCTS}
        return [
            Candidate(name, size, Tile(*tile), dtype)
            for name in PRODUCTS
            for size in sizes[name]
            for tile in FLOAT
        ]
    return [
        Candidate(name, size, Tile(*tile, tma=True), dtype)
        for name, by_size in HALF.items()
        for size, tiles in by_size.items()
        for tile in tiles
    ]


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="*")
    parser.add_argument("--passes", nargs="*", default=list(PRODUCTS))
    parser.add_argument("--first", type=int, default=99, help="candidates of each list")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--n", type=int, default=8192)
    parser.add_argument("--rep", type=int, default=40, help="milliseconds a measurement")
    parser.add_argument("--workers", type=int, default=12, help="0: nothing is compiled ahead")
    parser.add_argument("--compile-only", action="store_true")
    parser.add_argument("--waves", type=int, nargs="*", default=[tuning.WAVE_BYTES >> 20])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    seen: dict[tuple[str, int], int] = {}
    candidates = []
    for candidate in candidates_of(arguments.dtype):
        place = seen[candidate[:2]] = seen.get(candidate[:2], 0) + 1
        wanted = not arguments.sizes or candidate.size in arguments.sizes
        if wanted and candidate.name in arguments.passes and place <= arguments.first:
            candidates.append(candidate)
    if arguments.workers:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(arguments.workers, mp_context=context) as pool:
            list(pool.map(compile_one, candidates))
    if arguments.compile_only:
        return
    rows = []
    for candidate in candidates:
        for wave in arguments.waves:
            row: dict[str, Any] = {**candidate._asdict(), "n": arguments.n, "wave": wave}
            with mock.patch.object(tuning, "WAVE_BYTES", wave << 20):
                for causal in (False, True):
                    try:
                        row |= time_one(candidate, causal=causal, n=arguments.n, rep=arguments.rep)
                    except triton.runtime.errors.OutOfResources as error:
                        row["error"] = str(error)
            rows.append(row)
            print(json.dumps(row), flush=True)
    if arguments.out:
        conditions = {
            "card": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": triton.__version__,
        }
        arguments.out.write_text(json.dumps({**conditions, "tflops": rows}, indent=1))


if __name__ == "__main__":
    main()
