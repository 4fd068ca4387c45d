"""When a kernel is compiled anew: for other constants and types, never for other numbers."""

import inspect
from collections.abc import Callable
from typing import Any

import triton


def kernel(function: Callable[..., Any]) -> Any:
    """`triton.jit` for a kernel whose lower-case arguments are numbers that vary between calls.

    Triton would compile anew for a 1 and for a multiple of 16 among them, so that a model that
    generates would stop to compile at some lengths.
    """
    return triton.jit(function, do_not_specialize=numbers(function))


def numbers(function: Callable[..., Any]) -> list[str]:
    """The arguments of a kernel that are numbers: those in lower case."""
    return [name for name in inspect.signature(function).parameters if name.islower()]
