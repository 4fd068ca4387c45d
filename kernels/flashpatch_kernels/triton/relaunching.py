"""A launch that is made again with other tensors, for little more than what the driver takes.

Triton's launcher for a kernel is a function in C and what prepares its arguments. The function asks
the driver about every tensor, but takes an address as it is; and nothing that it is given changes
from launch to launch but addresses, the stream and the memory that a kernel wants for itself. The
order of all that differs from one Triton to the next, so the launcher itself is asked for it once.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from contextvars import copy_context
from copy import copy
from typing import Any, NamedTuple

import triton
from torch import Tensor

from flashpatch_kernels.triton import launching, memory
from flashpatch_kernels.tuning import Tile


class Launch:
    """A launch with all its arguments but the tensors."""

    def __init__(
        self, compiled: Any, n_programs: int, tile: Tile, arguments: tuple[Any, ...]
    ) -> None:
        self.compiled = compiled
        self._grid_and_tile = n_programs, tile
        self._places = [at for at, x in enumerate(arguments) if isinstance(x, Tensor)]
        self._rest = [_without_tensors(x) for x in arguments]
        self._nests = [at for at, x in enumerate(arguments) if type(x) is tuple and tensors_in(x)]
        self._given = given(compiled, n_programs)
        self._stream_of = triton.runtime.driver.active.get_current_stream

    def make(self, *tensors: Tensor) -> None:
        """Makes it on the current stream of the tensors' device, which is the current one.

        Args:
            tensors: In the order of `tensors_in` the arguments.
        """
        by_addresses = self._given is not None and not launching.watched()
        arguments = self._rest.copy()
        rest = iter([x.data_ptr() for x in tensors] if by_addresses else tensors)
        for at in self._places:
            arguments[at] = next(rest)
        for at in self._nests:
            arguments[at] = _with_tensors(arguments[at], rest)
        if not by_addresses:
            launching.start(self.compiled, *self._grid_and_tile, arguments)
            return
        function, before, stream_at, scratch_at, scratch_bytes, flat = self._given
        device = tensors[0].device
        before = before.copy()
        before[stream_at] = self._stream_of(device.index)
        if scratch_at is not None:
            # Held until the kernel is on the stream, in whose order torch gives the memory away.
            scratch = memory.empty_bytes(scratch_bytes, device)
            before[scratch_at] = scratch.data_ptr()
        if flat:
            function(*before, *arguments)
        else:
            function(*before, arguments)


def tensors_in(arguments: tuple[Any, ...]) -> list[Tensor]:
    """The tensors among arguments, and after them those in tuples."""
    found = [x for x in arguments if isinstance(x, Tensor)]
    for x in arguments:
        if type(x) is tuple:
            found += tensors_in(x)
    return found


# Stands for a tensor.
_TENSOR = object()


def _without_tensors(x: Any) -> Any:
    """An argument, with something else in the place of every tensor."""
    if type(x) is tuple:
        return tuple(map(_without_tensors, x))
    return _TENSOR if isinstance(x, Tensor) else x


def _with_tensors(x: Any, tensors: Iterator[Any]) -> Any:
    """The same with other tensors, in the order of `tensors_in`."""
    filled = [next(tensors) if y is _TENSOR else y for y in x]
    return tuple([_with_tensors(y, tensors) if type(y) is tuple else y for y in filled])


class Given(NamedTuple):
    """What Triton's launcher of a kernel gives its function in C.

    Attributes:
        before: What comes before the kernel's own arguments.
        stream: Where in it the stream stands.
        scratch: Where in it memory stands that the kernel wants for itself; None if it wants none.
        flat: Whether the kernel's arguments follow one by one, or as one sequence.
    """

    function: Callable[..., Any]
    before: list[Any]
    stream: int
    scratch: int | None
    scratch_bytes: int
    flat: bool


# Stand for what differs between launches; launchers pass them on without a look.
_STREAM, _SCRATCH, _ARGUMENTS = object(), object(), object()


def given(compiled: Any, n_programs: int) -> Given | None:
    """What a launch of so many programs is given, as the launcher tells; None if it does not.

    As one that has no such function, that brings memory for measurements along, that passes on
    something else, or that looks into what it is given.
    """
    launcher = compiled.run
    function = getattr(launcher, "launch", None)
    if function is None or getattr(launcher, "profile_scratch_size", 0):
        return None
    told: list[Any] = []
    n_bytes = 0

    def allocate(size: int, alignment: int, stream: Any) -> object:
        nonlocal n_bytes
        n_bytes = size
        return _SCRATCH

    def ask() -> None:
        triton.set_allocator(allocate)
        asked = copy(launcher)
        asked.launch = lambda *arguments: told.extend(arguments)
        launching.run(asked, compiled, n_programs, _STREAM, (_ARGUMENTS,))

    # An allocator that is set in a copy of the context is forgotten with it. Whatever the launcher
    # of another Triton says to such arguments, it can still be called with real ones.
    with suppress(Exception):
        copy_context().run(ask)
    *before, last = told or [None]
    flat = last is _ARGUMENTS
    if _STREAM not in before or not (flat or last == (_ARGUMENTS,)):
        return None
    scratch = before.index(_SCRATCH) if n_bytes else None
    return Given(function, before, before.index(_STREAM), scratch, n_bytes, flat)
