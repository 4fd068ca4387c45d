"""The softmax of a consumer, which seldom asks for a maximum.

Weights are 2^(s - m) with a reference m for each row. Whatever m is, the softmax is the same, as
long as no weight overflows: m is the maximum of the first tile of keys, and moves only when weights
have grown far beyond 1. That shows in their sums, which are taken anyway: each of the four lanes
that share a row sums what it has, and a warp votes whether one of its sums is beyond a limit. With
a maximum of every tile, its exponentials would wait for a comparison of each score and for two
exchanges between lanes, and what was accumulated would be rescaled every time: a fifth of the time.

Rows are independent: one whose weights are fine keeps its reference when its neighbour moves.

Letters: R queries of a consumer, BN keys of a tile; everything in base 2.

Source: the skipped rescaling of flash-attention (flash_attn/cute/softmax.py, `rescale_threshold`),
which still computes the maximum.
"""

from triton import constexpr_function

from flashpatch_kernels.hopper.gluon import gl, jit
from flashpatch_kernels.hopper.powers import powers
from flashpatch_kernels.hopper.products import operand
from flashpatch_kernels.triton import tiles
from flashpatch_kernels.triton.tiles import LOG2E, LOWEST


@constexpr_function
def limit(dtype):
    """The exponent of the largest sum of weights that a type of 16 bits holds with ease."""
    return 15 if dtype == gl.float16 else 40


@constexpr_function
def vote(exponent):
    """Whether all lanes of a warp have two sums up to 2^exponent; if not, sets the carry flag."""
    most = f"0f{(127 + exponent) << 23:08x}"
    return (
        "{ .reg .pred fine; .reg .b32 x; "
        f"setp.le.f32 fine, $2, {most}; setp.le.and.f32 fine, $3, {most}, fine; "
        "vote.sync.all.pred fine, fine, -1; selp.b32 x, 0, -1, fine; add.cc.u32 x, x, 1; "
        "mov.b32 $0, $2; mov.b32 $1, $3; }"
    )


@jit
def beyond(sums, LIMIT: gl.constexpr):
    """Whether one of a warp's sums [R, 4] is beyond the limit or not a number, as a number.

    No operation gives a number of a warp's own from its part of a tensor. The carry flag does.
    """
    text: gl.constexpr = vote(LIMIT)
    sums = gl.inline_asm_elementwise(
        text, "=r,=r,r,r", [sums], dtype=gl.float32, is_pure=False, pack=2
    )
    carry: gl.constexpr = "addc.u32 $0, $1, 0;"
    return sums, gl.inline_asm_elementwise(
        carry, "=r,r", [0], dtype=gl.int32, is_pure=False, pack=1
    )


@jit
def lane_sums(p):
    """The sums [R, 4] of what each of the four lanes has of a row of p [R, BN]."""
    return gl.sum(gl.sum(p.reshape([p.shape[0], p.shape[1] // 8, 4, 2]), 3), 1)


@jit
def like_rows(x, of):
    """Numbers [R] of rows as a column beside a tile [R, ...]; every thread has those it needs."""
    layout: gl.constexpr = gl.SliceLayout(1, of.type.layout)
    return gl.expand_dims(gl.convert_layout(x, layout, assert_trivial=True), 1)


@jit
def rounded(x, dtype: gl.constexpr):
    """Numbers x in 16 bits: as `x.to(dtype)`, but never merged with another conversion.

    Merged, they would wait until the branches that they are in have met, and x with them, in twice
    the registers.
    """
    if dtype == gl.float16:
        return gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=gl.float16, is_pure=False, pack=2
        )
    else:
        return gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=gl.bfloat16, is_pure=False, pack=2
        )


@jit
def start(sinks, head, ROWS: gl.constexpr, LAYOUT: gl.constexpr):
    """The running maximum and sum before the first key, see `tiles.softmax_start`."""
    m = gl.full([ROWS], LOWEST, gl.float32, LAYOUT)
    l = gl.full([ROWS], 0.0, gl.float32, LAYOUT)
    if sinks is not None:
        sink = gl.load(sinks + head).to(gl.float32) * LOG2E
        m = gl.maximum(m, sink)
        l = gl.exp2(sink - m)
    return m, l


@jit
def first_step(s, m, l, to_log2, dtype: gl.constexpr, DV: gl.constexpr):
    """The weights of the first tile of scores [R, BN], after m [R] and l [R], say of a sink.

    Returns:
        p [R, BN] as an operand, the reference m [R], the sums l [R, 4] of the four lanes.
    """
    p, m, l, _alpha = tiles.softmax_step(s, m, l, to_log2)
    quarters = lane_sums(gl.full(s.shape, 1 / s.shape[1], gl.float32, s.type.layout))
    return operand(p, dtype, DV), m, quarters * like_rows(l, quarters)


@jit
def weigh(s, m, to_log2, POLYNOMIALS: gl.constexpr):
    """The weights [R, BN] of scores of reference m [R], of 8 columns so many by polynomials."""
    if POLYNOMIALS > 0:
        return powers(s, to_log2, gl.expand_dims(m, 1), POLYNOMIALS)
    else:
        return gl.exp2(s * to_log2 - gl.expand_dims(m, 1))


@jit
def step(s, m, to_log2, dtype: gl.constexpr, DV: gl.constexpr, POLYNOMIALS: gl.constexpr):
    """The weights of a tile of scores [R, BN], of reference m [R].

    Returns:
        p [R, BN] as an operand, the lanes' sums [R, 4] of it, and whether the reference must
        `move`, as a number of this warp.
    """
    weights = weigh(s, m, to_log2, POLYNOMIALS)
    p = operand(rounded(weights, dtype), dtype, DV)
    sums, moves = beyond(lane_sums(weights), limit(dtype))
    return p, sums, moves


@jit
def move(s, m, l, sums, to_log2, dtype: gl.constexpr, DV: gl.constexpr, POLYNOMIALS: gl.constexpr):
    """The same once more, of a reference that lies nearer where the sums are beyond the limit.

    Returns:
        p, its sums, the reference, the sums l [R, 4] of tiles before, and the factor [R] by which
        these were rescaled, as must be what was accumulated.
    """
    LIMIT: gl.constexpr = limit(dtype)
    most = gl.convert_layout(gl.max(sums, 1), m.type.layout, assert_trivial=True)
    m_new = gl.where(most <= 2.0**LIMIT, m, gl.maximum(m, gl.max(s, 1) * to_log2))
    alpha = gl.exp2(m - m_new)
    weights = weigh(s, m_new, to_log2, POLYNOMIALS)
    p = operand(weights, dtype, DV)
    sums = lane_sums(weights)
    if POLYNOMIALS > 0:
        # Of a score that is not a number: nothing else is above the new reference.
        sums = gl.where(sums < float("inf"), sums, float("nan"))
    return p, sums, m_new, l * like_rows(alpha, l), alpha
