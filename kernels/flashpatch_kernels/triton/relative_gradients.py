"""The gradients of vectors by distance and of what they are multiplied by, as sums over tiles.

Of a tile's ds and dropped weights p, ordered by query and distance or by distance and key (see
`relative`), they are sums of
    dx = ds' w  [S, E]        dy = ds'^T u  [S, E]        over the other tiles of a row or column
    dw = ds'^T x  [W, E]      du = ds' y  [W, E]          dz = p'^T dO  [W, Dv]
over the tiles on one diagonal, in all rows. The windows of two neighbouring diagonals have half
their distances in common, which PyTorch adds.

Letters as in `relative`; tiles of S queries and S keys, W = 2 S. A program sums EB columns of E, or
all of Dv. The diagonal o has the tiles that begin at query a S and key a S + o S.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashpatch_kernels.options import Relative
from flashpatch_kernels.triton import relative, setups, tiles
from flashpatch_kernels.triton.stats import Shared
from flashpatch_kernels.triton.sums import (
    Walk,
    key_place,
    key_steps,
    own_tile,
    query_place,
    query_steps,
    sum_ds,
)
from flashpatch_kernels.triton.term_gradients import (
    diagonals,
    table_place,
    table_steps,
    table_sum,
    visible,
)


@triton.jit
def diagonal_steps(
    walk, pid, mask, n_batch, n_heads, n_queries, n_keys, WHOLE: tl.constexpr, C: tl.constexpr
):
    """How many tiles of a diagonal are this program's."""
    pid = pid // walk[3]
    return table_steps(walk, pid, mask, n_batch, n_heads, n_queries, n_keys, WHOLE, C)


@triton.jit
def diagonal_place(
    walk, pid, t, mask, n_batch, n_heads, n_queries, n_keys, WHOLE: tl.constexpr, C: tl.constexpr
):
    """Row, head, first query and first key of the t-th tile."""
    pid = pid // walk[3]
    return table_place(walk, pid, t, mask, n_batch, n_heads, n_queries, n_keys, WHOLE, C)


@triton.jit
def start_vectors(C: tl.constexpr):
    """No gradient of vectors: [S, EB]."""
    return tiles.zeros(C.BM, C.EB, 0)[0]


@triton.jit
def start_embeddings(C: tl.constexpr):
    """No gradient of embeddings: [W, EB]."""
    return tiles.zeros(C.W, C.EB, 0)[0]


@triton.jit
def start_values(C: tl.constexpr):
    """No gradient of embeddings of values: [W, V0], [W, V1]."""
    return tiles.zeros(C.W, C.V0, C.V1)


@triton.jit
def first_column(E: tl.constexpr, C: tl.constexpr):
    """The first of the columns that a program sums."""
    return tl.program_id(0) % tl.cdiv(E, C.EB) * C.EB


@triton.jit
def add_query_vectors(acc, p, ds, weights, do, m, n, head, score, C: tl.constexpr):
    """Adds ds' w: [S, EB]."""
    embeddings = relative.query_embeddings(m, n, head, score, C)
    w = relative.window(embeddings, first_column(C.X, C), C.EB, C.X, C)  # [W, EB]
    return tiles.dot(relative.by_query_and_distance(ds, C).to(w.dtype), w, acc, C)


@triton.jit
def add_key_vectors(acc, p, ds, weights, do, m, n, head, score, C: tl.constexpr):
    """Adds ds'^T u: [S, EB]."""
    embeddings = relative.key_embeddings(m, n, head, score, C)
    u = relative.window(embeddings, first_column(C.Y, C), C.EB, C.Y, C)  # [W, EB]
    return tiles.dot(relative.by_distance_and_key(ds, C).T.to(u.dtype), u, acc, C)


@triton.jit
def add_query_embeddings(acc, p, ds, weights, do, m, n, head, score, C: tl.constexpr):
    """Adds ds'^T x: [W, EB]."""
    of_head = relative.query_vectors(head, score, C)
    x = relative.vectors(of_head, m, score[5], first_column(C.X, C), C.BM, C.EB, C.X)  # [S, EB]
    return tiles.dot(relative.by_query_and_distance(ds, C).T.to(x.dtype), x, acc, C)


@triton.jit
def add_key_embeddings(acc, p, ds, weights, do, m, n, head, score, C: tl.constexpr):
    """Adds ds' y: [W, EB]."""
    of_head = relative.key_vectors(head, score, C)
    y = relative.vectors(of_head, n, score[6], first_column(C.Y, C), C.BN, C.EB, C.Y)  # [S, EB]
    return tiles.dot(relative.by_distance_and_key(ds, C).to(y.dtype), y, acc, C)


@triton.jit
def add_value_embeddings(acc, p, ds, weights, do, m, n, head, score, C: tl.constexpr):
    """Adds p'^T dO: [W, V0], [W, V1]."""
    return tiles.add_product(acc, relative.by_query_and_distance(weights, C).T, do, C)


@triton.jit
def finish_query_vectors(walk, pid, acc, out, n_queries, n_keys, C: tl.constexpr):
    """Stores a part of the gradient [B, H, N, E]."""
    store_vectors(walk, pid, acc, out, n_queries, C)


@triton.jit
def finish_key_vectors(walk, pid, acc, out, n_queries, n_keys, C: tl.constexpr):
    """Stores a part of the gradient [B, H, M, E]."""
    store_vectors(walk, pid, acc, out, n_keys, C)


@triton.jit
def store_vectors(walk, pid, acc, out, n_rows, C: tl.constexpr):
    """Stores S rows and EB columns of a gradient [B, H, n_rows, E], walk[3] = E."""
    n_parts, size = walk[2], walk[3]
    bh, start = own_tile(walk, pid, n_rows, C.BM)
    row = (start + tl.arange(0, C.BM))[:, None]
    c = (pid % n_parts * C.EB + tl.arange(0, C.EB))[None, :]
    at = out + tl.cast(bh, tl.int64) * n_rows * size
    inside = (row < n_rows) & (c < size)
    tl.store(at + (row.to(tl.int64) * size + c), acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def finish_embeddings(walk, pid, acc, out, n_queries, n_keys, C: tl.constexpr):
    """Stores a sum [heads, diagonals, chunks, parts of E, W, EB]."""
    n_parts = walk[3]
    at = table_sum(walk, pid // n_parts) * n_parts + pid % n_parts
    at = out + at * (C.W * C.EB)
    tiles.store(at, C.EB, 0, C.W, (acc,), C.W, C.EB, C.EB, 0)


@triton.jit
def finish_values(walk, pid, acc, out, n_queries, n_keys, C: tl.constexpr):
    """Stores a sum [heads, diagonals, chunks, 1, W, Dv]."""
    at = out + table_sum(walk, pid) * (C.W * C.DV)
    tiles.store(at, C.DV, 0, C.W, acc, C.W, C.DV, C.V0, C.V1)


# The functions of each sum: `start`, `add` and `finish`.
VECTORS = {
    "query_vectors": (start_vectors, add_query_vectors, finish_query_vectors),
    "key_vectors": (start_vectors, add_key_vectors, finish_key_vectors),
}
EMBEDDINGS = {
    "query_embeddings": (start_embeddings, add_query_embeddings, finish_embeddings),
    "key_embeddings": (start_embeddings, add_key_embeddings, finish_embeddings),
    "value_embeddings": (start_values, add_value_embeddings, finish_values),
}


def relative_gradients(shared: Shared, needs: frozenset[str]) -> dict[str, Tensor]:
    """The gradients of a call's vectors by distance and embeddings that `needs` names."""
    options = shared.call.options
    owners = {
        "query": options.relative_queries,
        "key": options.relative_keys,
        "value": options.relative_values,
    }
    grads: dict[str, Tensor] = {}
    if not any(shared.call.vector_sizes):
        return grads
    for name in (*VECTORS, *EMBEDDINGS):
        owner = owners[name.split("_")[0]]
        if owner is not None and name in needs:
            compute = vectors_gradient if name in VECTORS else embeddings_gradient
            grads[name] = compute(shared, name, owner)
    return grads


def vectors_gradient(shared: Shared, name: str, owner: Relative) -> Tensor:
    """The gradient of vectors of queries or keys, [B, H, N|M, E]."""
    vectors = owner.vectors
    assert vectors is not None
    _, _, _, n_queries, n_keys = shared.call.sizes
    tile, fixed = shared.call.tuned("sums")
    n_batch, n_heads, n_rows, size = vectors.shape
    n_parts = setups.cdiv(size, fixed.EB)
    low, high = visible(shared.call.options.mask, 1 - n_queries, n_keys - 1)
    out = torch.empty(vectors.shape, dtype=vectors.dtype, device=vectors.device)
    start, add, finish = VECTORS[name]
    steps = (query_steps, query_place) if name == "query_vectors" else (key_steps, key_place)
    n_programs = n_batch * n_heads * setups.cdiv(n_rows, tile.BM) * n_parts
    sum_ds(
        shared, out, Walk(*steps, finish, None, (low, high, n_parts, size), n_programs, start, add)
    )
    return out


def embeddings_gradient(shared: Shared, name: str, owner: Relative) -> Tensor:
    """The gradient of embeddings, [H|1, T, E]."""
    _, n_heads, _, n_queries, n_keys = shared.call.sizes
    tile, fixed = shared.call.tuned("sums")
    heads, entries, size = owner.embeddings.shape
    first_diagonal, n_diagonals, n_chunks = diagonals(shared.call, 1 - n_queries, n_keys - 1)
    found = owner.embeddings.new_zeros((n_heads, entries, size), dtype=torch.float32)
    if n_diagonals:
        width = size if name == "value_embeddings" else fixed.EB
        n_parts = setups.cdiv(size, width)
        sums = found.new_empty((n_heads, n_diagonals, n_chunks, n_parts, 2 * tile.BM, width))
        start, add, finish = EMBEDDINGS[name]
        numbers = (first_diagonal, n_diagonals, n_chunks, n_parts)
        walk = Walk(
            *(diagonal_steps, diagonal_place, finish, None, numbers),
            *(n_heads * n_diagonals * n_chunks * n_parts, start, add),
        )
        sum_ds(shared, sums, walk)
        first = (first_diagonal - 1) * tile.BN + 1 - owner.first
        add_clamped(found, by_distance(sums)[..., :size], first)
    if heads == 1:
        found = found.sum(0, keepdim=True)
    return found.to(owner.embeddings.dtype)


def by_distance(sums: Tensor) -> Tensor:
    """From sums [H, diagonals, chunks, parts, W, EB] to [H, distances, parts EB].

    The first distance is the first of the first diagonal's window.
    """
    halves = sums.sum(2).unflatten(3, (2, -1)).permute(0, 1, 3, 4, 2, 5).flatten(4)
    found = torch.nn.functional.pad(halves[:, :, 0], (0, 0, 0, 0, 0, 1))
    found[:, 1:] += halves[:, :, 1]
    return found.flatten(1, 2)


def add_clamped(total: Tensor, x: Tensor, first: int) -> None:
    """Adds x [H, distances, E], which begin at entry `first`, to total [H, T, E].

    What lies beyond the entries belongs to the first or the last of them.
    """
    entries, n = total.shape[1], x.shape[1]
    begin = min(max(-first, 0), n)
    end = max(begin, min(entries - first, n))
    if begin < end:
        total[:, first + begin : first + end] += x[:, begin:end]
    total[:, 0] += x[:, :begin].sum(1)
    total[:, -1] += x[:, end:].sum(1)
