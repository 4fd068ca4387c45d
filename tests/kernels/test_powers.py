"""Powers of two by polynomials, of the instructions that the Hopper kernels are given."""

import numpy as np
import pytest

pytest.importorskip("triton", minversion="3.6", reason="Triton 3.6 is not installed")

from flashpatch_kernels.hopper import powers

# A quarter of what rounding to float16 may err by.
LEAST = 2.0**-13


def rounded(x):
    """Of a number in float64, which has room for a product of two in float32 and little less."""
    return np.asarray(x, np.float64).astype(np.float32)


OPERATIONS = {
    "cvt.sat.f32.f32": lambda x: np.where(np.isnan(x), 0, np.clip(x, 0, 1)),
    "ex2.approx.ftz.f32": np.exp2,
    "fma.rn.f32": lambda x, y, z: rounded(np.float64(x) * np.float64(y) + np.float64(z)),
    "sub.f32": lambda x, y: x - y,
    "mov.b32": lambda x: x,
    "shl.b32": lambda x, y: x.view(np.uint32) << np.uint32(y),
    "add.s32": lambda x, y: x.view(np.uint32) + y.view(np.uint32),
}


def follow(text, given):
    """What the registers hold after a piece of assembly, arrays of float32 or of bits."""
    registers = dict(given)
    for line in text.strip("{} ").split(";"):
        name, _, operands = line.strip().partition(" ")
        if not name or name == ".reg":
            continue
        out, *operands = [x.strip() for x in operands.split(",")]
        values = [registers[x] if x in registers else np.float32(x) for x in operands]
        found = OPERATIONS[name](*values)
        registers[out] = found if found.dtype == np.uint32 else found.astype(np.float32)
    return {name: x.view(np.float32) for name, x in registers.items()}


def by_polynomial(x):
    """2^x for x in float32, as a kernel asks for it: with what is x in the polynomial's unit."""
    u = rounded(np.float64(x) * np.float32(-1 / 255) + np.float32(128 / 255))
    return follow(powers.polynomial("y", "u"), {"u": u})["y"]


def test_a_polynomial_errs_less_than_rounding_to_16_bits():
    x = np.linspace(-125.5, 127.99, 2_000_001, dtype=np.float32)
    exact = np.exp2(x.astype(np.float64))
    assert np.abs(by_polynomial(x) / exact - 1).max() < LEAST


def test_the_integer_and_the_fraction_meet_without_a_step():
    x = np.concatenate([np.arange(-20, 20) + 0.5 + y for y in (-1e-6, 0, 1e-6)])
    y = by_polynomial(x.astype(np.float32))
    assert np.abs(y / np.exp2(x) - 1).max() < LEAST


def test_what_is_masked_is_0_and_what_lies_below_is_next_to_it():
    assert (by_polynomial(np.float32([-np.inf, -1e30, -200.0, -127.0])) == 0).all()
    small = by_polynomial(np.linspace(-127, -125, 1001, dtype=np.float32))
    assert (small >= 0).all()
    assert (small <= 2.0**-124).all()


def test_what_is_no_power_or_beyond_float32_is_seen():
    x = np.float32([np.nan, np.inf, 1e30, 1000.0, 128.01])
    assert (by_polynomial(x) == np.inf).all()


@pytest.mark.parametrize("columns", range(1, 8))
def test_so_many_columns_of_8_are_polynomials_in_both_rows(columns):
    x = np.float32(np.linspace(-3, 3, 16))
    given = {f"${16 + i}": x[i : i + 1] for i in range(16)}
    given |= {f"${32 + i}": rounded((128 - np.float64(x[i : i + 1])) / 255) for i in range(16)}
    text = powers.sixteen(columns)
    found = follow(text, given)
    y = np.concatenate([found[f"${i}"] for i in range(16)])
    assert np.abs(y / np.exp2(x) - 1).max() < LEAST
    both = [f"ex2.approx.ftz.f32 ${i}," in text for i in range(16)]
    rows = np.reshape(both, (4, 2, 2))
    assert (rows[:, 0] == rows[:, 1]).all()
    assert both.count(False) == 2 * columns
