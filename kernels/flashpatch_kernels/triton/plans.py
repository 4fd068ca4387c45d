"""Launches that alike calls share: calls that differ in nothing but their tensors' memory.

What a kernel is launched with follows from shapes, strides and options, and finding it takes longer
than anything else. So the first of alike calls leaves it here, and the others only bring tensors.
"""

from functools import lru_cache
from typing import Any

from torch import Tensor

from flashpatch_kernels.masks import Band
from flashpatch_kernels.options import Options
from flashpatch_kernels.triton import launching
from flashpatch_kernels.tuning import Tile


class Plan:
    """A launch, with all its arguments but the tensors; empty until the first of alike calls.

    Attributes:
        kept: Whether other calls will have it; if not it stays empty.
    """

    def __init__(self, *, kept: bool) -> None:
        self.kept = kept
        self._launch: tuple[Any, int, Tile, list[Any], list[int]] | None = None

    def launch(self, kernel: Any, n_programs: int, tile: Tile, *arguments: Any) -> None:
        """Makes a launch, as `launching.launch` does, and keeps it."""
        compiled = launching.launch(kernel, n_programs, tile, *arguments)
        if compiled is None or not self.kept:
            return
        places = [at for at, x in enumerate(arguments) if isinstance(x, Tensor)]
        rest = list(arguments)
        for at in places:
            rest[at] = None
        self._launch = compiled, n_programs, tile, rest, places

    def again(self, *tensors: Tensor | None) -> Any:
        """Makes the launch that was kept, if there is one, with other tensors.

        Args:
            tensors: In the order of the arguments, None for each that such a call has not.

        Returns:
            What was compiled for it; None if there is none.
        """
        if self._launch is None:
            return None
        compiled, n_programs, tile, rest, places = self._launch
        arguments = rest.copy()
        for at, x in zip(places, [x for x in tensors if x is not None], strict=True):
            arguments[at] = x
        launching.start(compiled, n_programs, tile, arguments)
        return compiled


def plan_of(kernel: Any, tensors: tuple[Tensor, ...], options: Options) -> Plan:
    """The plan that alike calls of a kernel share; one of its own for a call that shares none.

    Shared are those under a Band and without terms but sinks.

    Args:
        tensors: What the call is given, on one device. Those that it makes follow from these, and
            lie at multiples of 16 bytes, as all that torch allocates.
    """
    o, mask = options, options.mask
    relative = o.relative_queries or o.relative_keys or o.relative_values
    bare = o.table is o.slopes is o.bias is o.score is relative is None and not o.dropout
    if not bare or not isinstance(mask, Band):
        return Plan(kept=False)
    if o.sinks is not None:
        tensors = (*tensors, o.sinks)
    return shared(
        *(id(kernel), tensors[0].device, launching.precision(tensors[0].dtype)),
        *[(t.shape, t.stride(), t.dtype, t.data_ptr() % 16) for t in tensors],
        *(mask.left, mask.right, mask.offset, o.scale, o.softcap),
    )


@lru_cache(1024)
def shared(*alike: Any) -> Plan:
    """One plan for all calls that are alike in this; those longest unused are forgotten."""
    return Plan(kept=True)
