"""Gluon under one set of names, whichever Triton is installed, and what of Hopper it leaves out.

Names changed after Triton 3.6; nothing else in this package knows of it.
"""

from typing import Any

from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from flashpatch_kernels.triton import compiling

__all__ = [
    "barrier",
    "fence_async_shared",
    "gl",
    "jit",
    "kernel",
    "mbarrier",
    "store_wait",
    "tma",
    "tma_add",
    "tma_load",
    "tma_store",
    "warpgroup_mma",
    "warpgroup_mma_wait",
]

jit = gluon.jit
_gl: Any = gl
barrier = getattr(_gl, "barrier", None) or _gl.thread_barrier
_tma: Any = tma
tma_load = getattr(_tma, "async_load", None) or _tma.async_copy_global_to_shared
store_wait = _tma.store_wait
tma_store = getattr(_tma, "async_store", None) or _tma.async_copy_shared_to_global


if hasattr(_tma, "async_atomic_add"):
    tma_add = _tma.async_atomic_add
else:  # Triton 3.6 has the instruction, not its name.

    @builtin
    def tma_add(tensor_desc: Any, coord: Any, src: Any, _semantic: Any = None) -> None:
        """Adds a tile in shared memory to one of a matrix."""
        at = _semantic._convert_to_ir_values(coord, require_i64=False)
        add = ir.DESCRIPTOR_REDUCE_KIND.ADD
        _semantic.builder.create_async_tma_reduce(add, tensor_desc.handle, at, src.handle)


def kernel(function: Any) -> Any:
    """`gluon.jit` for a kernel whose lower-case arguments are numbers, see `compiling.kernel`."""
    return jit(function, do_not_specialize=compiling.numbers(function))
