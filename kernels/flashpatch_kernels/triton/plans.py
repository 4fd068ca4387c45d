"""Launches that alike calls share: calls that differ in nothing but their tensors' memory.

What a kernel is launched with follows from shapes, strides and options, and finding it takes longer
than anything else. So the first of alike calls leaves it here, and the others only bring addresses.
"""

from functools import lru_cache
from typing import Any

from torch import Tensor

from flashpatch_kernels.masks import Band
from flashpatch_kernels.options import Options
from flashpatch_kernels.triton import launching, memory, setups
from flashpatch_kernels.triton.relaunching import Launch
from flashpatch_kernels.tuning import Tile


class Plan:
    """A launch, with all its arguments but the tensors; empty until the first of alike calls.

    Attributes:
        kept: Whether other calls will have it; if not it stays empty.
    """

    def __init__(self, *, kept: bool) -> None:
        self.kept = kept
        self._launch: Launch | None = None
        self._outputs: tuple[setups.Layout, setups.Layout] | None = None

    def outputs(self, q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Memory for output and lse, on the tensors' device; a card must be the current one."""
        if self._outputs is None:
            self._outputs = setups.output_layouts(q, v)
        out, lse = self._outputs
        return memory.empty(*out, q.device), memory.empty(*lse, q.device)

    def launch(self, kernel: Any, n_programs: int, tile: Tile, *arguments: Any) -> None:
        """Makes a launch, as `launching.launch` does, and keeps it."""
        compiled = launching.launch(kernel, n_programs, tile, *arguments)
        if compiled is not None and self.kept:
            self._launch = Launch(compiled, n_programs, tile, arguments)

    def again(self, *tensors: Tensor | None) -> Any:
        """Makes the launch that was kept, if there is one, with other tensors.

        Args:
            tensors: In the order of the arguments, None for each that such a call has not.

        Returns:
            What was compiled for it; None if there is none.
        """
        if self._launch is None:
            return None
        self._launch.make(*tensors)
        return self._launch.compiled


def plan_of(
    kernel: Any, q: Tensor, k: Tensor, v: Tensor, options: Options
) -> tuple[Plan, Tensor, Tensor, Tensor]:
    """The plan that alike calls of a kernel share, and q, k and v as kernels can read them."""
    plan = _plan_of(kernel, q, k, v, options)
    if not plan.kept:  # perhaps because of rows that are not read as they are
        q, k, v = setups.readable(q), setups.readable(k), setups.readable(v)
        plan = _plan_of(kernel, q, k, v, options)
    return plan, q, k, v


def _plan_of(kernel: Any, q: Tensor, k: Tensor, v: Tensor, options: Options) -> Plan:
    """The plan that alike calls share; one of its own for a call that shares none.

    Shared are those under a Band and without terms but sinks, of tensors that are read as they are.
    The tensors that such a call makes follow from those that it is given, and lie at multiples of
    16 bytes, as all that torch allocates.
    """
    o, mask, sinks = options, options.mask, options.sinks
    relative = o.relative_queries or o.relative_keys or o.relative_values
    bare = o.table is o.slopes is o.bias is o.score is relative is None and not o.dropout
    if not bare or not isinstance(mask, Band):
        return Plan(kept=False)
    return shared(
        (_layout(q), _layout(k), _layout(v)),
        None if sinks is None else _layout(sinks),
        *(id(kernel), q.device, setups.precision(q.dtype)),
        *(mask.left, mask.right, mask.offset, o.scale, o.softcap),
    )


@lru_cache(1024)
def shared(given: tuple[tuple[Any, ...], ...], *alike: Any) -> Plan:
    """One plan for all calls that are alike in this; those longest unused are forgotten."""
    return Plan(kept=all(setups.rows_readable(stride) for _, stride, *_ in given))


def _layout(t: Tensor) -> tuple[Any, ...]:
    """What of a tensor decides about a launch."""
    return t.shape, t.stride(), t.dtype, t.data_ptr() % 16
