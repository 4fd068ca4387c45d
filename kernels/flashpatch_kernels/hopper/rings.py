"""Rings of tiles in shared memory, from the warps that read memory to those that compute.

A ring is (tiles, full, free): SLOTS tiles [1, 1, ROWS, D], a barrier for each that tells its
readers that it is there, and one that tells the producer that they have done with it. Everything
that goes through a ring has a number, counted from 0: its slot and the phase of its barriers follow
from that.

Two rings may share their barriers (`beside`): their tiles of one number come and go together. That
saves a consumer waiting and telling, each of which its warps meet for; a twentieth of a forward.
"""

from flashpatch_kernels.hopper.gluon import fence_async_shared, gl, jit, mbarrier, tma, tma_load


@jit
def slots(SLOTS: gl.constexpr, ROWS: gl.constexpr, D: gl.constexpr, dtype: gl.constexpr):
    """Room for so many tiles."""
    shape: gl.constexpr = (1, 1, ROWS, D)
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for(shape, dtype)
    return gl.allocate_shared_memory(dtype, [SLOTS, 1, 1, ROWS, D], layout)


@jit
def ring(
    SLOTS: gl.constexpr, ROWS: gl.constexpr, D: gl.constexpr,
    WRITERS: gl.constexpr, READERS: gl.constexpr, dtype: gl.constexpr,
):  # fmt: skip
    """A ring of empty slots, full after WRITERS arrivals and read by READERS partitions."""
    tiles = slots(SLOTS, ROWS, D, dtype)
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(full.index(slot), count=WRITERS)
        mbarrier.init(free.index(slot), count=READERS)
    return tiles, full, free


@jit
def beside(ring, ROWS: gl.constexpr, D: gl.constexpr):
    """A ring of other tiles that come and go together with those of a ring."""
    tiles, full, free = ring
    return slots(tiles.shape[0], ROWS, D, tiles.dtype), full, free


@jit
def again(ring, SLOTS: gl.constexpr):
    """A ring of the same tiles for who reads them after others, and says that they are free."""
    tiles, _full, free = ring
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(full.index(slot), count=1)
    return tiles, full, free


@jit
def put(ring, number, matrix, batch, head, row, SLOTS: gl.constexpr):
    """Reads a tile of a matrix into its slot, once that is free."""
    tiles, full, free = ring
    slot = number % SLOTS
    mbarrier.wait(free.index(slot), (number // SLOTS & 1) ^ 1)
    mbarrier.expect(full.index(slot), matrix.block_type.nbytes)
    tma_load(matrix, [batch, head, row, 0], full.index(slot), tiles.index(slot))


@jit
def put_both(
    ring, other, number, matrix, other_matrix, batch, head, row, other_row, SLOTS: gl.constexpr
):  # fmt: skip
    """As `put`, of a tile of each of two rings that share their barriers."""
    tiles, full, free = ring
    slot = number % SLOTS
    mbarrier.wait(free.index(slot), (number // SLOTS & 1) ^ 1)
    nbytes: gl.constexpr = matrix.block_type.nbytes + other_matrix.block_type.nbytes
    mbarrier.expect(full.index(slot), nbytes)
    tma_load(matrix, [batch, head, row, 0], full.index(slot), tiles.index(slot))
    tma_load(other_matrix, [batch, head, other_row, 0], full.index(slot), other[0].index(slot))


@jit
def put_numbers(ring, numbers, number, x, SLOTS: gl.constexpr):
    """Writes a number for each row of a tile beside it, and arrives at its barrier."""
    slot = number % SLOTS
    numbers.index(slot).store(x)
    mbarrier.arrive(ring[1].index(slot), count=1)


@jit
def take(ring, number, SLOTS: gl.constexpr):
    """The tile of a number, [ROWS, D], once it is there."""
    mbarrier.wait(ring[1].index(number % SLOTS), number // SLOTS & 1)
    return tile_of(ring, number, SLOTS)


@jit
def tile_of(ring, number, SLOTS: gl.constexpr):
    """The tile of a number, [ROWS, D], that is known to be there."""
    tile = ring[0].index(number % SLOTS)
    return tile.reshape([tile.shape[2], tile.shape[3]])


@jit
def leave(ring, number, SLOTS: gl.constexpr):
    """Says that this partition has done with a tile."""
    mbarrier.arrive(ring[2].index(number % SLOTS), count=1)


@jit
def await_free(ring, number, SLOTS: gl.constexpr):
    """Waits until readers have done with what was in the slot of a tile."""
    mbarrier.wait(ring[2].index(number % SLOTS), (number // SLOTS & 1) ^ 1)


@jit
def tell_full(ring, number, SLOTS: gl.constexpr):
    """Says that this partition has written its tile."""
    mbarrier.arrive(ring[1].index(number % SLOTS), count=1)


@jit
def give(ring, number, x, SLOTS: gl.constexpr):
    """Hands a tile [ROWS, D] in registers to the readers of a ring."""
    await_free(ring, number, SLOTS)
    ring[0].index(number % SLOTS).reshape(x.shape).store(x)
    fence_async_shared()
    tell_full(ring, number, SLOTS)


@jit
def matrix(
    base, strides, n_batch, n_heads, n_rows,
    SIZE: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr,
):  # fmt: skip
    """[n_batch, n_heads, n_rows, SIZE] as the copy engine knows it, [ROWS, COLUMNS] at a time.

    What is read beyond the last row or column is zero, what is written there is dropped. `strides`
    are those of the first three dimensions, in units of 16 bytes.
    """
    dtype: gl.constexpr = base.dtype.element_ty
    UNIT: gl.constexpr = 128 // dtype.primitive_bitwidth
    shape: gl.constexpr = (1, 1, ROWS, COLUMNS)
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for(shape, dtype)
    batch = strides[0].to(gl.int64) * UNIT
    head = strides[1].to(gl.int64) * UNIT
    row = strides[2].to(gl.int64) * UNIT
    return tma.make_tensor_descriptor(
        base, [n_batch, n_heads, n_rows, SIZE], [batch, head, row, 1], shape, layout
    )
