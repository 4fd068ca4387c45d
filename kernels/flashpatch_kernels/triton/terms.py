"""The terms of a call, from its options to what kernels are composed of."""

import hashlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashpatch_kernels.triton import bias, relative, scores, setups, slopes, table
from flashpatch_kernels.triton.plans import Steps


class Term(NamedTuple):
    """One term: three device functions, see `scores`, and the tensors that `open` is given."""

    open: Any
    add: Any
    far_add: Any
    pointers: tuple[Tensor, ...]


class Composed(NamedTuple):
    """What a kernel is composed of, and given, for tiles of one orientation, see `scores`.

    Attributes:
        opens: `open` of each term.
        adds: `add` of each.
        far_adds: `add` of each on tiles where a table is constant.
        pointers: What each `open` is given. A table comes first, a user's function last.
        code: Tells functions of one name apart, of which Triton's cache on disk knows the names.
    """

    opens: tuple[Any, ...]
    adds: tuple[Any, ...]
    far_adds: tuple[Any, ...]
    pointers: tuple[tuple[Tensor, ...], ...]
    code: str

    @property
    def functions(self) -> tuple[Any, ...]:
        """What kernels are composed of, in their order."""
        return self.opens, self.adds, self.far_adds, self.code

    def without(self, fixed: int | None) -> tuple[Any, ...]:
        """The same with one term apart, for `sums_kernel`: its `add`, and its place."""
        if fixed is None:
            return self.opens, self.adds, None, self.code
        rest = tuple(scores.nothing if at == fixed else add for at, add in enumerate(self.adds))
        return self.opens, rest, (self.adds[fixed], fixed), self.code

    @staticmethod
    def of(terms: list[Term]) -> "Composed":
        """From the terms of tiles of one orientation."""
        if not terms:
            return NOTHING
        opens, adds, far_adds, pointers = zip(*terms, strict=True)
        return Composed(opens, adds, far_adds, pointers, _code(*opens, *adds))


def _code(*functions: Any) -> str:
    key = tuple(map(id, functions))
    if key not in _CODES:
        keys = "".join(getattr(function, "cache_key", "") for function in functions)
        _CODES[key] = hashlib.sha256(keys.encode()).hexdigest()[:16], functions
    return _CODES[key][0]


NOTHING = Composed((), (), (), (), "")

# By identity, because Triton's hash of a function takes long; they live as long as their key.
_CODES: dict[tuple[int, ...], tuple[str, tuple[Any, ...]]] = {}


class Terms(NamedTuple):
    """What is added to the scores of a call.

    Attributes:
        straight: For tiles [queries, keys].
        transposed: For tiles [keys, queries].
        numbers: bias_batch, bias_head, bias_row, table_rows, table_row, first, last, origin, as
            kernels take them, and after these the vectors by distance (see `relative`).
        far: Whether tiles are told apart on which a table is constant.
    """

    straight: Composed
    transposed: Composed
    numbers: tuple[Any, ...]
    far: bool


NO_TERMS = Terms(NOTHING, NOTHING, (), far=False)


def slopes_term(x: Tensor) -> Term:
    """That of slopes, for tiles of either orientation."""
    return Term(slopes.open, slopes.add, slopes.add, (x,))


def terms_of(call: setups.Setup, steps: Steps, *, both: bool) -> Terms:
    """The terms of a call, for tiles of `both` orientations or only [queries, keys]."""
    options = call.options
    straight: list[Term] = []
    transposed: list[Term] = []
    bias_strides, table_numbers = [0, 0, 0], (0, 0, 0, 0)
    tma = call.tuned("forward")[1].TMA
    if options.table is not None:
        both_ways, tensors, table_numbers = _table(options.table, call, steps, tma=tma, both=both)
        for orientation, (opens, add), x in zip(
            (straight, transposed), both_ways, tensors, strict=True
        ):
            orientation.append(Term(opens, add, scores.nothing if call.far else add, (x,)))
    if options.slopes is not None:
        one = slopes_term(options.slopes)
        straight.append(one)
        transposed.append(one)
    if options.bias is not None:
        both_ways, tensor, bias_strides = _bias(options.bias, call.sizes, steps, tma=tma)
        for orientation, (opens, add) in zip((straight, transposed), both_ways, strict=True):
            orientation.append(Term(opens, add, add, (tensor,)))
    score = options.score
    if score is not None:
        functions = [f for f in (score.function, score.derivative) if f is not None]
        own = [Term(scores.open_arguments, f, f, score.arguments) for f in functions]
        straight += own
        transposed += own
    return Terms(
        Composed.of(straight),
        Composed.of(transposed),
        (*bias_strides, *table_numbers, call.origin, *relative.arguments(options, call.dtype)),
        call.far,
    )


Functions = tuple[Any, Any]

POINTERS = ((bias.open, bias.add_pairs), (bias.open, bias.add_pairs))
KEYS = ((bias.open, bias.add_keys), (bias.open, bias.add_keys))
KEYS_ONCE = ((bias.open, bias.add_keys_once), (bias.open, bias.add_keys_once))
SHARED_KEYS = ((bias.open, bias.add_keys), (bias.open_rows, bias.add_rows))
SHARED_KEYS_ONCE = ((bias.open, bias.add_keys_once), (bias.open_rows, bias.add_rows))
TILES = (
    (bias.open_tiles, bias.add_tiles),
    (bias.open_tiles_transposed, bias.add_tiles_transposed),
)

ENTRIES = ((table.open, table.add_entries), (table.open, table.add_entries_transposed))
COPIES = ((table.open, table.add), (table.open, table.add_transposed))
COPIED_TILES = (
    (table.open_tiles, table.add_tiles),
    (table.open_tiles, table.add_tiles_transposed),
)


def _table(
    x: Tensor, call: setups.Setup, steps: Steps, *, tma: bool, both: bool
) -> tuple[tuple[Functions, Functions], tuple[Tensor, Tensor], tuple[int, int, int, int]]:
    """`open` and `add` of a table for both orientations, what each reads, and its numbers."""
    first = call.first
    last = first + x.shape[1] - 1
    if call.far:
        x = x if x.stride(1) == 1 else steps.copied(x, x.dtype)
        return ENTRIES, (x, x), (1, x.stride(0), first, last)
    copies = [
        table.copies_of(steps, x, first, table.TILE, call.dtype, reverse=reverse)
        for reverse in ((False, True) if both else (False,))
    ]
    functions = COPIED_TILES if tma else COPIES
    numbers = table.TILE, copies[0].shape[2] // 8, first, last
    return functions, (copies[0], copies[-1]), numbers


def _bias(
    x: Tensor, sizes: tuple[int, ...], steps: Steps, *, tma: bool
) -> tuple[tuple[Functions, Functions], Tensor, list[int]]:
    """`open` and `add` of a bias for both orientations, the bias, and its strides."""
    _, _, group, _, n_keys = sizes
    x = x if x.stride(-1) == 1 or n_keys == 1 else steps.copied(x, x.dtype)
    if x.shape[2] == 1 or x.stride(2) == 0:
        if setups.NVIDIA and x.dtype != torch.float32:
            x = steps.copied(x[:, :, :1] if x.shape[2] > 1 else x, torch.float32)
        strides = setups.strides(x)
        if group == 1 or strides[1] == 0:
            return SHARED_KEYS_ONCE if setups.NVIDIA else SHARED_KEYS, x, strides
        return KEYS_ONCE if setups.NVIDIA else KEYS, x, strides
    if tma and _aligned(x):
        return TILES, x, [stride // 8 for stride in setups.strides(x)]
    return POINTERS, x, setups.strides(x)


def _aligned(x: Tensor) -> bool:
    """Whether the copy engine can read every row."""
    strides = setups.strides(x)
    return x.element_size() <= 4 and x.data_ptr() % 16 == 0 and not any(s % 8 for s in strides)
