"""Times of the Triton kernels with candidate tiles, from which the table in `tuning` was filled.

Every candidate is compiled first, by many processes at once; then each kernel is timed alone.
Run on a GPU: `PYTHONPATH=.:kernels python benchmarks/triton_tiles.py --out tiles.json`.
"""

import argparse
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from flashpatch_kernels import tuning
from flashpatch_kernels.masks import Band
from flashpatch_kernels.options import Options
from flashpatch_kernels.triton import backward, forward, launching
from flashpatch_kernels.tuning import Tile
from triton.testing import do_bench

FORWARD, DKDV, DQ = "forward", "dkdv", "dq"

# Floating-point operations of a pass, in products of N x M x D.
PRODUCTS = {FORWARD: 2, DKDV: 4, DQ: 3}

CANDIDATES: dict[tuple[str, int], list[Tile]] = {
    (FORWARD, 64): [
        Tile(128, 64, 4, 3), Tile(128, 64, 4, 3, True), Tile(128, 64, 4, 2, True),
        Tile(128, 64, 4, 4, True), Tile(128, 128, 8, 2, True), Tile(128, 128, 8, 3, True),
        Tile(64, 128, 4, 2, True), Tile(64, 64, 4, 3, True), Tile(128, 64, 8, 3, True),
        Tile(256, 64, 8, 3, True), Tile(128, 32, 4, 4, True),
    ],
    (FORWARD, 80): [Tile(128, 64, 4, 2, True), Tile(128, 64, 8, 3, True), Tile(64, 64, 4, 3, True)],
    (FORWARD, 96): [
        Tile(128, 64, 4, 2, True), Tile(128, 64, 8, 3, True), Tile(128, 128, 8, 2, True),
        Tile(64, 64, 4, 2, True),
    ],
    (FORWARD, 128): [
        Tile(128, 64, 4, 2, True), Tile(128, 128, 8, 2, True), Tile(128, 64, 8, 3, True),
        Tile(128, 64, 8, 2, True), Tile(64, 64, 4, 2, True), Tile(64, 128, 4, 2, True),
        Tile(128, 32, 4, 3, True), Tile(128, 64, 8, 2, False),
    ],
    (FORWARD, 160): [Tile(128, 64, 8, 2, True), Tile(64, 64, 4, 2, True)],
    (FORWARD, 192): [Tile(128, 64, 8, 2, True), Tile(64, 64, 4, 2, True), Tile(128, 32, 8, 3, True)],
    (FORWARD, 256): [
        Tile(128, 64, 8, 2, True), Tile(64, 64, 4, 2, True), Tile(128, 32, 8, 3, True),
        Tile(128, 64, 8, 1, True),
    ],
    (DKDV, 64): [
        Tile(64, 128, 8, 2, True), Tile(64, 128, 8, 3, True), Tile(64, 128, 8, 2),
        Tile(64, 128, 8, 3), Tile(64, 64, 4, 2, True), Tile(64, 64, 4, 3, True),
        Tile(64, 64, 4, 2), Tile(32, 128, 8, 3, True), Tile(32, 128, 4, 2, True),
        Tile(128, 64, 8, 2, True),
    ],
    (DKDV, 80): [Tile(64, 128, 8, 2, True), Tile(64, 64, 4, 2, True)],
    (DKDV, 96): [Tile(64, 128, 8, 2, True), Tile(64, 64, 4, 2, True), Tile(32, 128, 8, 3, True)],
    (DKDV, 128): [
        Tile(64, 128, 8, 2, True), Tile(64, 128, 8, 3, True), Tile(64, 128, 8, 2),
        Tile(64, 64, 4, 2, True), Tile(32, 128, 8, 3, True), Tile(32, 128, 8, 2, True),
        Tile(64, 64, 8, 2, True), Tile(64, 64, 4, 3, True),
    ],
    (DKDV, 160): [Tile(32, 128, 8, 2, True), Tile(32, 64, 8, 2, True), Tile(64, 64, 8, 2, True)],
    (DKDV, 192): [Tile(32, 64, 8, 2, True), Tile(64, 64, 8, 2, True), Tile(32, 128, 8, 2, True)],
    (DKDV, 256): [
        Tile(32, 64, 8, 2, True), Tile(64, 64, 8, 2, True), Tile(32, 64, 8, 3, True),
        Tile(32, 128, 8, 2, True), Tile(16, 64, 8, 3, True),
    ],
    (DQ, 64): [
        Tile(128, 64, 8, 2, True), Tile(128, 64, 8, 3, True), Tile(128, 64, 4, 2, True),
        Tile(128, 64, 4, 3, True), Tile(128, 128, 8, 2, True), Tile(128, 128, 8, 2),
        Tile(64, 64, 4, 3, True), Tile(64, 128, 4, 2, True), Tile(128, 64, 8, 2),
    ],
    (DQ, 80): [Tile(128, 64, 8, 2, True), Tile(128, 128, 8, 2, True), Tile(64, 64, 4, 2, True)],
    (DQ, 96): [Tile(128, 64, 8, 2, True), Tile(128, 128, 8, 2, True), Tile(64, 64, 4, 2, True)],
    (DQ, 128): [
        Tile(128, 128, 8, 2, True), Tile(128, 64, 8, 2, True), Tile(128, 64, 8, 3, True),
        Tile(64, 64, 4, 2, True), Tile(128, 128, 8, 1, True), Tile(64, 128, 4, 2, True),
        Tile(128, 32, 8, 3, True),
    ],
    (DQ, 160): [Tile(128, 64, 8, 1, True), Tile(128, 64, 8, 2, True), Tile(64, 64, 8, 2, True)],
    (DQ, 192): [Tile(128, 64, 8, 1, True), Tile(64, 64, 8, 2, True), Tile(128, 32, 8, 2, True)],
    (DQ, 256): [
        Tile(64, 64, 8, 2, True), Tile(128, 32, 8, 2, True), Tile(128, 64, 8, 1, True),
        Tile(64, 32, 4, 2, True),
    ],
}  # fmt: skip


class Candidate(NamedTuple):
    """A tile for one pass over a head size."""

    name: str
    size: int
    tile: Tile


def launches_of(
    candidate: Candidate, *, causal: bool, n: int, hidden: int = 2048, run: bool = True
) -> tuple[Any, float]:
    """The kernel launch of a candidate's pass, as a function, and its 10^12 operations."""
    name, size, tile = candidate
    heads, batch = hidden // size, max(1, 16384 // n)
    torch.manual_seed(0)
    q, k, v, dout = (
        torch.randn(batch, n, heads, size, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        for _ in range(4)
    )
    made: dict[str, Any] = {}
    launch, table = launching.launch, tuning.tile

    def chosen(arch: str, dtype: torch.dtype, most: int, which: Any, **rest: Any) -> Tile:
        return tile if which == name else table(arch, dtype, most, which, **rest)

    def keep(kernel: Any, n_programs: int, tile: Tile, *arguments: Any) -> None:
        made[kernel.__name__] = lambda: launch(kernel, n_programs, tile, *arguments)
        if run:
            launch(kernel, n_programs, tile, *arguments)

    options = Options(Band(right=0) if causal else Band(), scale=size**-0.5)
    with mock.patch.object(tuning, "tile", chosen), mock.patch.object(launching, "launch", keep):
        out, lse = forward(q, k, v, options)
        if name != FORWARD:
            needs = frozenset("q" if name == DQ else "kv")
            backward(dout, None, q, k, v, out, lse, options, needs)
    operations = PRODUCTS[name] * 2 * batch * heads * n * n * size / (2 if causal else 1)
    return made[f"{name}_kernel"], operations / 1e12


def compile_one(candidate: Candidate) -> str | None:
    """Compiles a candidate, which leaves it in Triton's cache on disk; its error, if any."""
    try:
        launches_of(candidate, causal=True, n=256)[0]()
        torch.cuda.synchronize()
    except Exception as error:  # noqa: BLE001 - A candidate that does not fit is a result.
        return repr(error)[:200]
    return None


def time_one(candidate: Candidate, *, causal: bool, n: int, rep: int) -> float:
    """TFLOP/s of a candidate, from the median time."""
    launch, operations = launches_of(candidate, causal=causal, n=n)
    milliseconds = do_bench(launch, warmup=10, rep=rep, return_mode="median")
    return operations / milliseconds * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="*")
    parser.add_argument("--passes", nargs="*", default=[FORWARD, DKDV, DQ])
    parser.add_argument("--n", type=int, default=8192)
    parser.add_argument("--rep", type=int, default=40)
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--waves", type=int, nargs="*", default=[tuning.WAVE_BYTES >> 20])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    candidates = [
        Candidate(name, size, tile)
        for (name, size), tiles in CANDIDATES.items()
        if name in arguments.passes and (not arguments.sizes or size in arguments.sizes)
        for tile in tiles
    ]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.workers, mp_context=context) as pool:
        errors = list(pool.map(compile_one, candidates))
    rows = []
    for candidate, error in zip(candidates, errors, strict=True):
        row: dict[str, Any] = {**candidate._asdict(), "tile": list(candidate.tile), "n": arguments.n}
        if error:
            row["error"] = error
        else:
            for wave in arguments.waves:
                with mock.patch.object(tuning, "WAVE_BYTES", wave << 20):
                    for causal in (False, True):
                        key = f"{'causal' if causal else 'full'}{'' if len(arguments.waves) == 1 else f' wave {wave}'}"
                        rate = time_one(candidate, causal=causal, n=arguments.n, rep=arguments.rep)
                        row[key] = round(rate, 1)
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
