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


def in_turns(functions: Mapping[str, Callable[[], Any]], rep: int, rounds: int) -> dict[str, float]:
    """Milliseconds that each function takes on a rested GPU, measured for `rep` of them.

    Medians of several rounds, in which functions take turns: one of them, and not another, may meet
    a moment in which the card is slower.
    """
    for function in functions.values():
        function()  # may compile
    taken = [[_median_ms(f, rep) for f in functions.values()] for _ in range(rounds)]
    return dict(zip(functions, map(median, zip(*taken, strict=True)), strict=True))


def _median_ms(function: Callable[[], Any], rep: int) -> float:
    torch.cuda.synchronize()
    time.sleep(REST)
    found: Any = do_bench(function, warmup=15, rep=rep, return_mode="median")
    return found
