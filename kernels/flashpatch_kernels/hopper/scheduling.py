"""Which tiles a program works on, in which order, and when a consumer may issue products.

As many programs as the card runs at a time share all tiles of all heads. Neighbours work on tiles
of one head at the same time, because what they read then is read once for several of them. Where
later tiles have more work, as under a causal mask, a program takes tiles in pairs, the first with
the last, the second with the last but one: all pairs have the same work, and neighbours keep step.
"""

from triton import constexpr_function

from flashpatch_kernels.hopper.gluon import gl, jit
from flashpatch_kernels.triton import tile_masks


@jit
def share(units, seat):
    """How many units fall to a seat among all programs, dealt out one at a time."""
    programs = gl.num_programs(0)
    return units // programs + (seat < units % programs).to(gl.int32)


@jit
def turns(n_tiles, n_heads, PAIRED: gl.constexpr):
    """How many tiles this program has, of n_tiles in each of n_heads."""
    seat = gl.program_id(0)
    if PAIRED:
        # Those in the middle of an odd number have no partner: the last seats begin with them.
        alone = share(n_heads * (n_tiles % 2), gl.num_programs(0) - 1 - seat)
        return 2 * share(n_heads * (n_tiles // 2), seat) + alone
    else:
        return share(n_heads * n_tiles, seat)


@jit
def place(turn, n_tiles, n_batch, n_heads, PAIRED: gl.constexpr):
    """Tile of this program's turn, and its head: among all, then as row of the batch and in it."""
    programs = gl.num_programs(0)
    seat = gl.program_id(0)
    if PAIRED:
        half = n_tiles // 2
        in_pairs = 2 * share(n_batch * n_heads * half, seat)
        unit = turn // 2 * programs + seat
        at = unit % gl.maximum(half, 1)
        alone = (turn - in_pairs) * programs + programs - 1 - seat
        tile = gl.where(turn < in_pairs, gl.where(turn % 2 == 0, n_tiles - 1 - at, at), half)
        bh = gl.where(turn < in_pairs, unit // gl.maximum(half, 1), alone)
    else:
        unit = turn * programs + seat
        tile, bh = unit % n_tiles, unit // n_tiles
    return tile, bh, bh // n_heads, bh % n_heads


@jit
def edges_first(x, t0, t1, t2, t3):
    """The x-th of the tiles t0 .. t3, those first that are seen in part: all but t1 .. t2."""
    edges = t1 - t0 + t3 - t2
    return gl.where(x < edges, tile_masks.edge_tile(x, t0, t1, t2), t1 + x - edges)


@jit
def step_place(y, first, first_head, n, t0, t1, t2, t3, BM: gl.constexpr):
    """Head and first query of the y-th step: n tiles of queries of each head, from the first-th."""
    return first_head + y // n, edges_first((y + first) % n, t0, t1, t2, t3) * BM


@constexpr_function
def barrier(action, number, warpgroups):
    """A named barrier; Triton itself uses the first eight."""
    return f"bar.{action} {8 + number}, {128 * warpgroups}; mov.u32 $0, $1;"


@jit
def await_turn(consumer: gl.constexpr, x):
    """Waits until the consumer before this one has issued its products."""
    text: gl.constexpr = barrier("sync", consumer, 2)
    gl.inline_asm_elementwise(text, "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@jit
def pass_turn(consumer: gl.constexpr, CONSUMERS: gl.constexpr, x):
    """Lets the next consumer issue its own."""
    text: gl.constexpr = barrier("arrive", (consumer + 1) % CONSUMERS, 2)
    gl.inline_asm_elementwise(text, "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@jit
def meet(number: gl.constexpr, CONSUMERS: gl.constexpr, x):
    """Waits until all consumers are here."""
    text: gl.constexpr = barrier("sync", number, CONSUMERS)
    gl.inline_asm_elementwise(text, "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)
