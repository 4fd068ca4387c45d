"""What alike calls share: calls that differ in nothing but their tensors' memory.

What a call allocates and launches follows from shapes, strides and options, and finding it takes
longer than anything else. So the first of alike calls leaves its steps here, and the others take
them with their own tensors, by addresses.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashpatch_kernels import masks
from flashpatch_kernels.options import Options
from flashpatch_kernels.recent import Recent
from flashpatch_kernels.triton import launching, memory, setups
from flashpatch_kernels.triton.relaunching import Launch, tensors_in
from flashpatch_kernels.tuning import Tile


class Steps:
    """What a call does with its tensors and with memory of its own, done as it is told.

    A tensor is known by its place: first come those that the call is given, then its own memory, in
    the order in which it was told of.

    Args:
        tensors: What the call is given, None for each tensor that it has not.
        kept: Whether it is also written down.

    Attributes:
        repeatable: Whether all that was done is written down, so that it can be done again.
    """

    def __init__(self, *tensors: Tensor | None, kept: bool) -> None:
        self._tensors = list(tensors)
        self.layouts: list[setups.Layout] = []
        self.done: list[tuple[Callable[..., Any], list[int]]] = []
        # What is given twice has no place of its own.
        given = [id(x) for x in tensors if x is not None]
        self.repeatable = kept and len(set(given)) == len(given)

    def own(self, x: Tensor) -> Tensor:
        """The tensor, which the call has just allocated."""
        if self.repeatable:
            self._tensors.append(x)
            self.layouts.append(setups.Layout(tuple(x.shape), x.stride(), x.dtype))
        return x

    def copied(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The numbers of a tensor in memory of the call's own, one row after the other."""
        copy = self.own(torch.empty(x.shape, dtype=dtype, device=x.device))
        self.do(Tensor.copy_, copy, x)
        return copy

    def do(self, function: Callable[..., Any], *tensors: Tensor) -> None:
        """Has a function work on tensors."""
        function(*tensors)
        if self.repeatable:
            self.done.append((function, self.places(tensors)))

    def launch(self, kernel: Any, n_programs: int, tile: Tile, *arguments: Any) -> None:
        """Makes a launch, as `launching.launch` does."""
        compiled = launching.launch(kernel, n_programs, tile, *arguments)
        if compiled is None:
            self.repeatable = False
        elif self.repeatable:
            make = Launch(compiled, n_programs, tile, arguments).make
            self.done.append((make, self.places(tensors_in(arguments))))

    def places(self, tensors: Iterable[Tensor]) -> list[int]:
        """Where tensors stand; the steps cannot be taken again if one stands nowhere."""
        found = []
        for x in tensors:
            at = next((at for at, known in enumerate(self._tensors) if known is x), None)
            if at is None:
                self.repeatable = False
            else:
                found.append(at)
        return found


Pick = Callable[[Sequence[Any]], Sequence[Any]]


class Again(NamedTuple):
    """Steps without tensors.

    Attributes:
        layouts: Of the memory that they allocate.
        done: What is done, and what picks the tensors for it out of all.
        results: Picks what the call gives.
    """

    layouts: list[setups.Layout]
    done: list[tuple[Callable[..., Any], Pick]]
    results: Pick


def pick(places: list[int]) -> Pick:
    """What gives the tensors in these places, in the quickest way that there is."""
    return itemgetter(*places) if len(places) > 1 else itemgetter(slice(places[0], places[0] + 1))


class Plan:
    """The steps of alike calls; empty until the first of them.

    Attributes:
        kept: Whether other calls will have it; if not it stays empty.
    """

    def __init__(self, *, kept: bool) -> None:
        self.kept = kept
        self._again: Again | None = None

    def steps(self, *tensors: Tensor | None) -> Steps:
        """What a call on these tensors tells its steps to."""
        return Steps(*tensors, kept=self.kept)

    def keep(self, steps: Steps, *results: Tensor) -> None:
        """Keeps the steps of a call that gives these tensors, for those that are alike."""
        places = steps.places(results)
        if steps.repeatable and places:
            done = [(function, pick(at)) for function, at in steps.done]
            self._again = Again(steps.layouts, done, pick(places))

    def again(self, *tensors: Tensor | None) -> Sequence[Tensor] | None:
        """Takes the steps that were kept, if there are any, with other tensors.

        The first of them is on the device of all, which if it is a card is the current one.

        Returns:
            What the call gives; None if there are no steps.
        """
        if self._again is None:
            return None
        layouts, done, results = self._again
        device = tensors[0].device  # pyright: ignore[reportOptionalMemberAccess]
        known = [*tensors, *[memory.empty(*layout, device) for layout in layouts]]
        for function, given in done:
            function(*given(known))
        return results(known)


def plan_of(
    function: Any,
    tensors: tuple[Tensor, ...],
    others: tuple[Tensor | None, ...],
    options: Options,
    *alike: Any,
) -> tuple[Plan, tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    """The plan that alike calls of a function share.

    Shared are those of tensors that are read as they are, but for Booleans, vectors by distance and
    users' functions. The tensors that such a call makes follow from those that it is given, and lie
    at multiples of 16 bytes, as all that torch allocates.

    Args:
        tensors: [B, H, N, D], which kernels read in rows.
        others: What else the call is given beside its options, None for what it is not.
        alike: What else decides about its steps.

    Returns:
        The plan, the tensors as kernels can read them, and all that the plan's steps are given.
    """
    o = options
    band, (bounds, runs, allowed) = masks.parts(o.mask)
    others = (*others, o.sinks, o.table, o.slopes, o.bias, o.seed)
    if bounds is not None:
        others = (*others, bounds, runs)
    if o.relative or not (allowed is o.score is None):
        tensors = tuple(map(setups.readable, tensors))
        return Plan(kept=False), tensors, (*tensors, *others)
    same = (
        *(id(function), setups.precision(tensors[0].dtype), *band),
        *(o.scale, o.softcap, o.first, o.offset, o.dropout, *alike),
    )
    given = (*tensors, *others)
    there, addresses = [], 0
    for x in given:
        if x is not None:
            there.append(x)
            addresses |= x.data_ptr()
    latest = recent(same, tuple([x is None for x in others]))
    # It looks at no address, and so is for calls all of whose memory lies at multiples of 16 bytes.
    aligned = not addresses % 16
    plan = latest.found(*there) if aligned else None
    if plan is not None:
        return plan, tensors, given
    same = (*same, tensors[0].device, *[None if x is None else _layout(x) for x in others])
    layouts = tuple([_layout(x) for x in tensors])
    plan = shared(layouts, same)
    if plan.kept:
        if aligned:
            latest.note(plan, *there)
        return plan, tensors, given
    # Perhaps because of rows that are not read as they are.
    tensors = tuple(map(setups.readable, tensors))
    plan = shared(tuple(map(_layout, tensors)), (*same, layouts))
    return plan, tensors, (*tensors, *others)


@lru_cache(1024)
def shared(given: tuple[tuple[Any, ...], ...], same: tuple[Any, ...]) -> Plan:
    """One plan for all calls that are alike in this; those longest unused are forgotten."""
    return Plan(kept=all(setups.rows_readable(stride) for _, stride, *_ in given))


@lru_cache(256)
def recent(same: tuple[Any, ...], missing: tuple[bool, ...]) -> Recent[Plan]:
    """The plan that was last used by calls that are alike in all but their tensors."""
    return Recent()


def forget() -> None:
    """Forgets all plans."""
    shared.cache_clear()
    recent.cache_clear()


def _layout(t: Tensor) -> tuple[Any, ...]:
    """What of a tensor decides about a launch."""
    return t.shape, t.stride(), t.dtype, t.data_ptr() % 16
