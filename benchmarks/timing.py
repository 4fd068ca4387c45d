"""One way of measuring on a GPU, for all benchmarks that compare implementations."""

import time
from collections.abc import Callable
from typing import Any

import torch
from triton.testing import do_bench

# Seconds before each measurement: a card that is still warm from another is slower by a tenth, and
# whoever comes first would look better.
REST = 0.1


def median_ms(function: Callable[[], Any], rep: int) -> float:
    """Milliseconds that a function takes on a rested GPU, measured for `rep` of them."""
    function()  # may compile
    torch.cuda.synchronize()
    time.sleep(REST)
    median: Any = do_bench(function, warmup=15, rep=rep, return_mode="median")
    return median
