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
def value_chunks(tile, C: gl.constexpr):
    """As `chunks`, of a tile [ROWS, DV] of values or of what their output's gradient is."""
    if C.SIZE == C.VALUE_SIZE:
        return chunks(tile, C)
    else:
        return (tile,)


@jit
def start_inner(a, b, COLUMNS: gl.constexpr, C: gl.constexpr, begin=None):
    """Issues A B^T over the chunks of both: [R, D], [COLUMNS, D] -> [R, COLUMNS].

    It is added to `begin`, numbers [COLUMNS] or [R, COLUMNS], where they are given.
    """
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    sums = gl.full([C.R, COLUMNS], 0.0, gl.float32, layout)
    ADDS: gl.constexpr = begin is not None
    if ADDS:
        if len(begin.shape) == 1:
            sums = sums + gl.expand_dims(begin, 0)
        else:
            sums = begin
    started = warpgroup_mma(a[0], b[0].permute((1, 0)), sums, use_acc=ADDS, is_async=True)
    if len(a) > 1:
        started = warpgroup_mma(a[1], b[1].permute((1, 0)), started, is_async=True)
    return started


@jit
def operand(x, dtype: gl.constexpr, COLUMNS: gl.constexpr):
    """A tile in registers as the left operand of a product of so many columns."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    return gl.convert_layout(x.to(dtype), gl.DotOperandLayout(0, layout, 2))


@jit
def held(tile, COLUMNS: gl.constexpr):
    """A tile of shared memory as `operand` gives it, for products of so many columns."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    return tile.load(gl.DotOperandLayout(0, layout, 2))


@jit
def anew(x):
    """The same number, of which the compiler does not know that it is."""
    return gl.inline_asm_elementwise(
        "mov.u32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1
    )


@jit
def times_unpacked(x, y):
    """Numbers x in 32 bits times y in 16: as `x * y.to(gl.float32)`, with y kept until then.

    The compiler would else convert y early, and keep it in twice the registers.
    """
    HALF: gl.constexpr = (
        "{ .reg .b16 a, b; mov.b32 {a, b}, $4; cvt.f32.f16 $0, a; cvt.f32.f16 $1, b; "
    )
    BRAIN: gl.constexpr = "{ shl.b32 $0, $4, 16; and.b32 $1, $4, 0xffff0000; "
    TIMES: gl.constexpr = "mul.f32 $0, $0, $2; mul.f32 $1, $1, $3; }"
    text: gl.constexpr = (HALF if y.dtype == gl.float16 else BRAIN) + TIMES
    return gl.inline_asm_elementwise(
        text, "=&r,=&r,r,r,r", [x, y], dtype=gl.float32, is_pure=False, pack=2
    )
