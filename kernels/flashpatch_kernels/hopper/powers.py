"""Powers of two, a share of them without the unit for special functions.

A multiprocessor takes 16 of them a clock, or 16 hyperbolic tangents, of which capped scores need
one each; it adds and multiplies 128 times. Where heads are small, all wait for that unit: so of
every 8 columns that a thread has of a tile some are computed by additions and multiplications, in
all rows the same.

These are of x in [-127, 128], by the integer n next to it and the fraction f in [-1/2, 1/2]: to the
bits of 2^f, a polynomial, 2^23 n is added. What bounds x is an instruction that bounds its result
by 0 and 1; it is given (128 - x) / 255, and makes 0 of what is not a number. So this and what is
above 128 become infinity, which the softmax notices, and what is masked becomes 0.

Source: Cody and Waite, Software Manual for the Elementary Functions (1980), chapter 6, for n and f;
flash-attention (flash_attn/cute/utils.py, `ex2_emulation`) for the share.
"""

from triton import constexpr_function

from flashpatch_kernels.hopper.gluon import gl, jit


@constexpr_function
def polynomials(C):
    """How many of 8 columns: some where the unit bounds a kernel, else none.

    Chosen by measuring: half of them are best where the work of tiles grows, else a little less.
    """
    if not C.CAP or C.D > 64:
        return 0
    return 4 if C.PAIRED else 3


@constexpr_function
def polynomial(out, u):
    """The assembly of 2^(128 - 255 u), eight instructions with the one that gives u.

    Of polynomials of degree 3 that are 1 at 0 this has the least relative error, 1.02e-4, with
    the roundings 1.2e-4. Rounding to 16 bits may err by 4.9e-4 (float16) or 3.9e-3 (bfloat16).
    """
    # Beside 1.5 * 2^23 a float32 has no room for fractions: n + 128 is in the last bits of both.
    return (
        f"cvt.sat.f32.f32 f, {u}; fma.rn.f32 n, f, -255.0, 12583040.0; sub.f32 p, 12583040.0, n; "
        "fma.rn.f32 f, f, -255.0, p; fma.rn.f32 p, f, 0.0550089232, 0.242210961; "
        "fma.rn.f32 p, p, f, 0.693282929; fma.rn.f32 p, p, f, 1.0; "
        f"mov.b32 i, n; mov.b32 j, p; shl.b32 i, i, 23; add.s32 i, i, j; mov.b32 {out}, i; "
    )


@constexpr_function
def sixteen(of_eight):
    """The assembly of 16 powers, of 8 columns and two rows, which take turns every 2 columns."""
    text = "{ .reg .f32 n, f, p; .reg .b32 i, j; "
    for x in range(16):
        column = x // 4 * 2 + x % 2
        if column * of_eight % 8 < of_eight:
            text += polynomial(f"${x}", f"${x + 32}")
        else:
            text += f"ex2.approx.ftz.f32 ${x}, ${x + 16}; "
    return text + "}"


@jit
def powers(s, factor, less, POLYNOMIALS: gl.constexpr):
    """2^(s * factor - less) of a tile of products, of 8 columns so many by polynomials."""
    x = s * factor - less
    u = s * (factor * (-1 / 255)) + (less * (1 / 255) + 128 / 255)
    text: gl.constexpr = sixteen(POLYNOMIALS)
    operands: gl.constexpr = "=&f" + ",=&f" * 15 + ",f" * 32
    return gl.inline_asm_elementwise(
        text, operands, [x, u], dtype=gl.float32, is_pure=True, pack=16
    )
