"""Which tiles a program works on, in which order, and when a consumer may issue products.

As many programs as the card runs at a time share all tiles of all heads. Neighbours work on tiles
of one head at the same time, because what they read then is read once for several of them. Where
later tiles have more work, as under a causal mask, a program takes tiles in pairs, the first with
the last, the second with the last but one: all pairs have the same work, and neighbours keep step.
In step means that they read the same at the same time, from a cache, as if it were read once: they
begin the first tiles of pairs together, and end the second ones together.

Pairs are large, and the last round of them leaves programs without work. Where heads have many
tiles, the last full rounds and what is left beyond are DEALT out tile by tile instead, the largest
first, in every other round backwards: whoever had the smallest of a round has the largest of the
next.
"""

from triton import constexpr_function

from flashpatch_kernels.hopper.gluon import gl, jit
from flashpatch_kernels.triton import tile_masks


@jit
def share(units, seat):
    """How many units fall to a seat among all programs, dealt out one at a time."""
    programs = gl.num_programs(0)
    return units // programs + gl.where(seat < units % programs, 1, 0)


@jit
def rounds_of_pairs(n_tiles, n_heads):
    """How many rounds of pairs come before the tiles that are dealt out: all full ones but two."""
    return gl.maximum(n_heads * (n_tiles // 2) // gl.num_programs(0) - 2, 0)


@jit
def to_and_fro(turn):
    """Where this program sits in a round of tiles that are dealt out."""
    seat = gl.program_id(0)
    return gl.where(turn % 2 == 0, seat, gl.num_programs(0) - 1 - seat)


@jit
def turns(n_tiles, n_heads, PAIRED: gl.constexpr, DEALT: gl.constexpr = False):
    """How many tiles this program has, of n_tiles in each of n_heads."""
    seat = gl.program_id(0)
    if DEALT:
        in_pairs = 2 * rounds_of_pairs(n_tiles, n_heads)
        left = n_heads * n_tiles - in_pairs * gl.num_programs(0)
        return in_pairs + share(left, to_and_fro(left // gl.num_programs(0)))
    elif PAIRED:
        # Those in the middle of an odd number have no partner: the last seats begin with them.
        alone = share(n_heads * (n_tiles % 2), gl.num_programs(0) - 1 - seat)
        return 2 * share(n_heads * (n_tiles // 2), seat) + alone
    else:
        return share(n_heads * n_tiles, seat)


@jit
def place(turn, n_tiles, n_batch, n_heads, PAIRED: gl.constexpr, DEALT: gl.constexpr = False):
    """Tile of this program's turn, and its head: among all, then as row of the batch and in it."""
    programs = gl.num_programs(0)
    seat = gl.program_id(0)
    if DEALT:
        tile, bh = dealt(turn, n_tiles, n_batch * n_heads)
    elif PAIRED:
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
def dealt(turn, n_tiles, n_heads):
    """Tile of this program's turn, and its head among all, where the last rounds are dealt out.

    The rounds before take all pairs of the `whole` first heads. What these leave lies in a row, the
    largest tiles first: from its two ends come the pairs that fill the last of these rounds, and
    what is between is dealt out.
    """
    programs = gl.num_programs(0)
    half = n_tiles // 2
    rounds = rounds_of_pairs(n_tiles, n_heads)
    whole = rounds * programs // half
    # Branches, because to compute all three takes more registers.
    if turn < 2 * rounds:
        unit = turn // 2 * programs + gl.program_id(0)
        x = unit - whole * half
        if x < 0:
            at = unit % half
            tile, bh = gl.where(turn % 2 == 0, n_tiles - 1 - at, at), unit // half
        else:
            n_row = (n_heads - whole) * n_tiles + whole * (n_tiles % 2)
            x = gl.where(turn % 2 == 0, x, n_row - 1 - x)
            tile, bh = in_row(x, n_tiles, n_heads, whole)
    else:
        x = (turn - rounds) * programs + to_and_fro(turn) - whole * half
        tile, bh = in_row(x, n_tiles, n_heads, whole)
    return tile, bh


@jit
def in_row(x, n_tiles, n_heads, whole):
    """The x-th tile, and its head, of a row of what the pairs of the `whole` first heads leave.

    Each tile of all other heads, the last first; with the middle ones those of the whole heads too.
    """
    half = n_tiles // 2
    others = n_heads - whole
    alone = whole * (n_tiles % 2)
    middle = x - others * half
    is_alone = (middle >= 0) & (middle < alone)
    x = gl.where(middle < alone, x, x - alone)
    tile = gl.where(is_alone, half, n_tiles - 1 - x // others)
    return tile, gl.where(is_alone, middle, whole + x % others)


@jit
def edges_first(x, turn, t0, t1, t2, t3, C: gl.constexpr):
    """The x-th of the tiles t0 .. t3, those first that are seen in part: all but t1 .. t2.

    Of pairs the second tiles end together: they take those that are wholly seen from the last on,
    but for terms that take the registers for that.
    """
    edges = t1 - t0 + t3 - t2
    whole = t1 + x - edges
    if C.PAIRED and C.PLAIN:
        # A product instead of a choice between two tiles takes fewer registers.
        back = turn % 2
        whole = gl.where(back == 1, t2 + edges - 1, t1 - edges) + (1 - 2 * back) * x
    return gl.where(x < edges, tile_masks.edge_tile(x, t0, t1, t2), whole)


@jit
def course(tile, n_tiles, t0, n, group, C: gl.constexpr):
    """Where among n tiles of queries from t0 on a tile of keys begins its steps, see `step_place`.

    STAGGERED, two tiles of queries further than for the tile of keys before, as far as its keys
    are; where tiles come in pairs, at those which the later of them have as well. So programs that
    keep step come to a tile of queries two steps after each other. Those of a group of heads then
    come ever later to each next head, when what others read has left the L2: PACED, they begin so
    that they come to the middle head's at about the same time.
    """
    half = n_tiles // 2
    if not C.STAGGERED:
        return 0
    elif not C.PAIRED:
        return (gl.maximum(2 * tile, t0) - t0) % n
    elif C.PACED:
        pace = (group - 1) | 1  # an odd number, so that no two come to a tile in the same step
        earlier, later = pace * tile % n, (pace + 2) * (n_tiles - 1 - tile) % n
        return gl.where(tile < half, earlier, later)
    else:
        return gl.where(tile < half, gl.minimum(2 * (n_tiles - half - tile), n - 1), 0)


@jit
def step_place(y, begin, turn, first_head, n, group, C: gl.constexpr):
    """Head of the y-th step of a turn, and which of the n tiles of queries of each it is for.

    STAGGERED steps go on from `begin` to the last, and what is before they take from the first, or
    in pairs backwards. The others begin with the first; but under masks that have pairs all tiles
    of keys see queries up to the last, the first of each pair begin together and the second end
    together, so those go backwards. Heads of a group then take turns, so that programs with more
    tiles of queries do not fall behind.
    """
    if C.STAGGERED:
        x = y if C.ALONE else y % n
        head = first_head if C.ALONE else first_head + y // n
    elif C.PAIRED:
        x = y // group
        head = first_head if C.ALONE else first_head + y % group
    else:
        head, x = first_head if C.ALONE else first_head + y // n, y % n
    return head, met_tile(x, begin, turn, n, C)


@jit
def met_tile(x, begin, turn, n, C: gl.constexpr):
    """Which of n tiles of queries the x-th step of a turn for one head is for, see `step_place`."""
    if C.STAGGERED:
        rest = n - 1 - x if C.PAIRED and not C.PACED else x - (n - begin)
        return gl.where(x < n - begin, begin + x, rest)
    elif C.PAIRED:
        return gl.where(turn % 2 == 0, n - 1 - x, x)
    else:
        return x


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
