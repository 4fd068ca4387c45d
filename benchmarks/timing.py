"""One way of measuring on a GPU, for all benchmarks that compare implementations."""

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch
from triton.testing import do_bench

# Seconds before each measurement: a card that is still warm from another is slower by a tenth, and
# whoever comes first would look better.
REST = 0.1

# Milliseconds of a measurement. Within a tenth of a second of load a card lowers its clocks for the
# power they take, by up to a tenth and not at any fixed time: many short measurements tell kernels
# apart that differ by 1%, where a few long ones do not.
REP = 12


def in_turns(functions: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Milliseconds that each function takes on a rested GPU.

    Medians of several rounds, in which functions take turns: one of them, and not another, may meet
    a moment in which the card is slower.
    """
    for function in functions.values():
        function()  # may compile
    taken = [[_median_ms(f) for f in functions.values()] for _ in range(rounds)]
    return dict(zip(functions, map(median, zip(*taken, strict=True)), strict=True))


def _median_ms(function: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    time.sleep(REST)
    found: Any = do_bench(function, warmup=15, rep=REP, return_mode="median")
    return found
