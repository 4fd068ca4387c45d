"""Launches of kernels, which are compiled once for all calls that are alike in what decides."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from flashpatch_kernels.triton import memory
from flashpatch_kernels.triton.setups import INTERPRET, Constants
from flashpatch_kernels.tuning import Tile


def on(device: torch.device) -> AbstractContextManager[Any]:
    """The context in which kernels go to the device's own card."""
    # Only a card has a number; to ask for the type would take longer.
    if device.index is None or device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(device)


_HERE = nullcontext()


def scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory for the descriptors that a kernel makes, from torch's allocator."""
    return memory.empty_bytes(size, torch.device("cuda", torch.cuda.current_device()))


def launch(kernel: Any, n_programs: int, tile: Tile, *arguments: Any) -> Any:
    """Runs a kernel on the current device, all programs in the grid's first and largest dimension.

    What was compiled is kept by what it was compiled for, and run without Triton's own look at each
    argument.

    Returns:
        What was compiled for it; nothing under the interpreter.
    """
    if INTERPRET:
        return kernel[(n_programs,)](*arguments)
    n = _VARIABLE.get(id(kernel))
    if n is None:
        n = sum(not parameter.is_constexpr for parameter in kernel.params)
        _VARIABLE[id(kernel)] = n
    fixed = arguments[n:]
    key = (
        *(id(kernel), arguments[0].device, tile),
        # Within a loop, because most are numbers and a call for each takes as long as the launch.
        *[
            x.bit_length() > 31 if type(x) is int else None if x is None else _kind(x)
            for x in arguments[:n]
        ],
        *[x if type(x) in _PLAIN else _constant(x) for x in fixed],
    )
    known = _COMPILED.get(key)
    if known is not None:
        start(known[0], n_programs, tile, arguments)
        return known[0]
    if tile.tma:
        triton.set_allocator(scratch)
    compiled = kernel[(n_programs,)](*arguments, **compile_options(tile))
    # The functions among the arguments live as long as their names in the key.
    _COMPILED[key] = compiled, fixed
    return compiled


def start(compiled: Any, n_programs: int, tile: Tile, arguments: Sequence[Any]) -> None:
    """Runs what was compiled, on the current stream of the current device.

    Where no hook of Triton's watches launches, what it would be told of them is not prepared, which
    takes longer than all the rest.
    """
    if tile.tma:
        triton.set_allocator(scratch)
    if watched():
        compiled[(n_programs, 1, 1)](*arguments)
        return
    driver = triton.runtime.driver.active
    stream = driver.get_current_stream(driver.get_current_device())
    run(compiled.run, compiled, n_programs, stream, arguments)


def watched() -> bool:
    """Whether a hook of Triton's wants to be told of launches."""
    runtime = triton.knobs.runtime
    before, after = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(before, "calls", True) or getattr(after, "calls", True))


def run(
    launcher: Any, compiled: Any, n_programs: int, stream: Any, arguments: Sequence[Any]
) -> None:
    """Has a launcher of Triton's start what was compiled, and tell nobody."""
    told_and_hooks = (None, None, None)
    launcher(
        *(n_programs, 1, 1, stream, compiled.function, compiled.packed_metadata, *told_and_hooks),
        *arguments,
    )


def compile_options(tile: Tile) -> dict[str, Any]:
    """What Triton is told beside a kernel and its arguments."""
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
    if tile.together:
        options["launch_cooperative_grid"] = True
    return options if tile.registers is None else {**options, "maxnreg": tile.registers}


# Compiled kernels, and the constants that they were compiled for, by all that decides about them.
_COMPILED: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}
# How many of a kernel's arguments are none, which come first.
_VARIABLE: dict[int, int] = {}


def _constant(x: Any) -> Any:
    """A constant by its value, a function by its identity: Triton's hash of one takes long."""
    return tuple(map(_constant, x)) if type(x) is tuple else x if type(x) in _PLAIN else id(x)


def _kind(x: Any) -> Any:
    """What of an argument a kernel is compiled for, beside the size of a number."""
    if isinstance(x, Tensor):
        return x.dtype, x.data_ptr() % 16 == 0
    return tuple(map(_kind, x)) if type(x) is tuple else type(x)


_PLAIN = frozenset((int, str, bool, float, type(None), Constants))
