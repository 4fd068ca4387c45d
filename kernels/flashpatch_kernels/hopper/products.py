"""Operands of a warpgroup's products, and the start of those that sum over a head's columns."""

from flashpatch_kernels.hopper.gluon import gl, jit, warpgroup_mma


@jit
def chunks(tile, C: gl.constexpr):
    """The columns of a tile [ROWS, D] that its head has, as one or two widths of products."""
    if C.D1 > 0:
        return (tile.slice(0, C.D0, 1), tile.slice(C.D0, C.D1, 1))
    else:
        return (tile,)


@jit
def start_inner(a, b, COLUMNS: gl.constexpr, C: gl.constexpr):
    """Issues A B^T over the chunks of both: [R, D], [COLUMNS, D] -> [R, COLUMNS]."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    empty = gl.full([C.R, COLUMNS], 0.0, gl.float32, layout)
    started = warpgroup_mma(a[0], b[0].permute((1, 0)), empty, use_acc=False, is_async=True)
    if C.D1 > 0:
        started = warpgroup_mma(a[1], b[1].permute((1, 0)), started, is_async=True)
    return started


@jit
def operand(x, dtype: gl.constexpr, COLUMNS: gl.constexpr):
    """A tile in registers as the left operand of a product of so many columns."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    return gl.convert_layout(x.to(dtype), gl.DotOperandLayout(0, layout, 2))
