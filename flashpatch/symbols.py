"""What a mask function says, learnt by calling it once with symbols instead of indices.

transformers describes a mask by a function of four indices, f(batch, head, query, key) -> bool, and
fills an N x M tensor by calling it on all of them. Called on the symbols below, which understand
the arithmetic and the comparisons of masks, the same function tells which interval of keys each
query sees, in O(N) memory. What the function is called and how it was put together do not matter:
those of users and of later releases are read too. Nor must its closure be looked into, which is
impossible while torch.compile traces.

An operation without a meaning here, or a union that may not be one interval for every query, makes
a function unreadable: `read` returns None and its caller fills the N x M tensor after all. Nothing
is decided by the values of a tensor; what must be known about them is named in `Condition.given`.

Letters: B batch, N queries, M keys; q and k the positions of a query and of a key.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from flashpatch_kernels import masks

# Equal numbers stand side by side in the table whose entries are compared: packed documents
# (intersected with other conditions) and bidirectional blocks (united with them).
DOCUMENTS = "documents"
BLOCKS = "blocks"
# Positions rise by one from key to key. True inside a document, so this ends with `& DOCUMENTS`.
POSITIONS = "positions"

# What PyTorch calls the operators between a truth value in a tensor and a condition.
OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "__and__": operator.and_,
    "bitwise_and": operator.and_,
    "__or__": operator.or_,
    "bitwise_or": operator.or_,
}


class UnreadableError(Exception):
    """The function does something that has no meaning for symbols."""


@dataclass(frozen=True)
class Place:
    """Where the queries and the keys of a call stand.

    Attributes:
        positions: int64 [1, N], the queries' positions, never negative.
        batch: B.
        first_key: Position of the first key.
        n_keys: M.
    """

    positions: Tensor
    batch: int
    first_key: int
    n_keys: int


class Symbol:
    """Stands for an index, a number or a condition in a call of a mask function."""

    def _unreadable(self, *_: Any) -> Any:
        raise UnreadableError(f"an operation that {type(self).__name__} has no meaning for")

    __hash__ = None  # type: ignore[assignment]
    __bool__ = __index__ = __int__ = __float__ = __len__ = __iter__ = __getitem__ = _unreadable
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _unreadable
    __and__ = __rand__ = __or__ = __ror__ = __xor__ = __rxor__ = __invert__ = _unreadable
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __neg__ = __abs__ = _unreadable
    __floordiv__ = __rfloordiv__ = __truediv__ = __rtruediv__ = _unreadable
    __mod__ = __rmod__ = __pow__ = __rpow__ = _unreadable

    def to(self, *_: Any, **__: Any) -> "Symbol":
        """Itself: its tensors are on the device of the positions already."""
        return self


class Batch(Symbol):
    """The batch index: good for looking up tables."""


@dataclass(frozen=True, eq=False)
class Row(Symbol):
    """One number per query: factor * q + times * table[b, q + shift] + rest.

    Attributes:
        rest: A number, or integers of shape [B|1, N|1].
        table: Integers [B, L], read at the query's position.
    """

    place: Place
    factor: int = 0
    rest: int | Tensor = 0
    times: int = 0
    table: Tensor | None = None
    shift: int = 0

    @property
    def device(self) -> torch.device:
        """Where masks made of this are."""
        return self.place.positions.device

    def new_ones(self, *_: Any, **__: Any) -> "Condition":
        """The condition that is always true: with it `and_masks` begins."""
        return Condition(self.place)

    def new_zeros(self, *_: Any, **__: Any) -> "Condition":
        """The condition that is never true: with it `or_masks` begins."""
        return Condition(self.place, high=Row(self.place))

    def value(self) -> Tensor:
        """The numbers, int64 [B|1, N|1]."""
        terms: list[Tensor] = []
        if self.factor:
            terms.append(_times(self.place.positions, self.factor))
        if self.times:
            assert self.table is not None
            here = _at_queries(self.place, self.table, self.shift).long()
            terms.append(_times(here, self.times))
        if isinstance(self.rest, Tensor):
            terms.append(self.rest)
        elif not terms:
            return self.place.positions.new_full((1, 1), self.rest)
        elif self.rest != 0:
            terms[0] = terms[0] + self.rest
        return sum(terms[1:], start=terms[0])

    def less(self, other: "Row") -> int | None:
        """The same number self - other for every query, if that is plain to see."""
        if self.factor != other.factor or self.times != other.times:
            return None
        if self.times and not self._reads_as(other):
            return None
        if isinstance(self.rest, Tensor) or isinstance(other.rest, Tensor):
            return 0 if self.rest is other.rest else None
        return self.rest - other.rest

    def _reads_as(self, other: "Row") -> bool:
        return self.table is other.table and self.shift == other.shift

    def __add__(self, other: Any) -> Any:
        if isinstance(other, OfKeys):
            return other + self
        other = _row(self.place, other)
        if self.times and other.times and not self._reads_as(other):
            other = Row(self.place, rest=other.value())
        table, shift = (self.table, self.shift) if self.times else (other.table, other.shift)
        return Row(
            self.place,
            self.factor + other.factor,
            self.rest + other.rest,
            self.times + other.times,
            table,
            shift,
        )

    def __mul__(self, other: Any) -> "Row":
        times = _number(other)
        return replace(
            self, factor=self.factor * times, rest=self.rest * times, times=self.times * times
        )

    def __floordiv__(self, other: Any) -> "Row":
        return Row(self.place, rest=self.value() // _number(other))

    def __neg__(self) -> "Row":
        return self * -1

    def __sub__(self, other: Any) -> Any:
        return self + (-other)

    def __radd__(self, other: Any) -> Any:
        return self + other

    def __rsub__(self, other: Any) -> Any:
        return -self + other

    def __lt__(self, other: Any) -> Any:
        return other > self if isinstance(other, OfKeys) else self._compare(operator.lt, other)

    def __le__(self, other: Any) -> Any:
        return other >= self if isinstance(other, OfKeys) else self._compare(operator.le, other)

    def __gt__(self, other: Any) -> Any:
        return other < self if isinstance(other, OfKeys) else self._compare(operator.gt, other)

    def __ge__(self, other: Any) -> Any:
        return other <= self if isinstance(other, OfKeys) else self._compare(operator.ge, other)

    def __eq__(self, other: object) -> Any:
        if isinstance(other, OfKeys | Chunk):
            return other == self
        return self._compare(operator.eq, other)

    def _compare(self, comparison: Callable[[Any, Any], Any], other: Any) -> "Condition":
        difference = self - _row(self.place, other)
        least = difference.less(Row(self.place, 1)) if comparison is operator.ge else None
        if least is not None and least >= 0:
            # Positions are not negative: `q >= 0` is transformers' bidirectional mask.
            return self.new_ones()
        return Condition.where(self.place, comparison(difference.value(), 0))


class OfKeys(Symbol):
    """A number per query and key that rises or falls by one with each key, as `key` tells."""

    def key(self) -> "Key":
        """The same as sign * (k - base)."""
        raise NotImplementedError

    def __add__(self, other: Any) -> "Key":
        key = self.key()
        return replace(key, base=key.base - _row(key.base.place, other) * key.sign)

    def __neg__(self) -> "Key":
        key = self.key()
        return replace(key, sign=-key.sign)

    def __sub__(self, other: Any) -> "Key":
        return self + (-other)

    def __radd__(self, other: Any) -> "Key":
        return self + other

    def __rsub__(self, other: Any) -> "Key":
        return -self + other

    def __abs__(self) -> "Distance":
        key = self.key()
        return Distance(key.base, key.given)

    def __floordiv__(self, other: Any) -> "Chunk":
        key, size = self.key(), _number(other)
        if key.sign < 0 or size < 1:
            raise UnreadableError("a division of a falling number")
        return Chunk(key.base, size, key.given)

    def __lt__(self, other: Any) -> "Condition":
        key = self.key()
        return key.at_most(-1, other) if key.sign > 0 else key.at_least(1, other)

    def __le__(self, other: Any) -> "Condition":
        key = self.key()
        return key.at_most(0, other) if key.sign > 0 else key.at_least(0, other)

    def __gt__(self, other: Any) -> "Condition":
        key = self.key()
        return key.at_least(1, other) if key.sign > 0 else key.at_most(-1, other)

    def __ge__(self, other: Any) -> "Condition":
        key = self.key()
        return key.at_least(0, other) if key.sign > 0 else key.at_most(0, other)

    def __eq__(self, other: object) -> Any:
        key = self.key()
        return key.at_least(0, other) & key.at_most(0, other)


@dataclass(frozen=True, eq=False)
class Key(OfKeys):
    """sign * (k - base): the key's position, and what adding to it makes of it."""

    base: Row
    sign: int = 1
    given: frozenset[str] = frozenset()

    def key(self) -> "Key":
        """Itself."""
        return self

    def bound(self, other: Any) -> Row:
        """The k at which this number is `other`."""
        return self.base + _row(self.base.place, other) * self.sign

    def at_most(self, more: int, other: Any) -> "Condition":
        """Of keys up to `more` beyond the bound."""
        return Condition.between(None, self.bound(other) + (more + 1), self.given)

    def at_least(self, more: int, other: Any) -> "Condition":
        """Of keys from `more` beyond the bound on."""
        return Condition.between(self.bound(other) + more, None, self.given)


@dataclass(frozen=True, eq=False)
class Entry(OfKeys):
    """table[b, k + shift]."""

    place: Place
    table: Tensor
    shift: int

    def key(self) -> Key:
        """As positions: where they rise by one per key, table[b, k] = table[b, q] + k - q."""
        here = Row(self.place, times=1, table=self.table, shift=self.shift)
        return Key(Row(self.place, 1) - here, 1, frozenset({POSITIONS}))

    def __eq__(self, other: object) -> Any:
        here = Row(self.place, times=1, table=self.table, shift=self.shift)
        if not isinstance(other, Row) or other.less(here) != 0:
            return OfKeys.__eq__(self, other)
        # The run of equal numbers in which the query stands.
        runs = masks.documents(self.table[: self.place.batch]).bounds.long()  # [B, L, 2]
        run = runs.index_select(1, self.place.positions[0] + self.shift) - self.shift  # [B, N, 2]
        low, high = (Row(self.place, rest=run[..., side]) for side in (0, 1))
        return Condition(self.place, low, high, given=frozenset({DOCUMENTS}))


@dataclass(frozen=True, eq=False)
class Distance(Symbol):
    """|k - base|."""

    base: Row
    given: frozenset[str]

    def __lt__(self, other: Any) -> "Condition":
        other = _row(self.base.place, other)
        return Condition.between(self.base - other + 1, self.base + other, self.given)

    def __le__(self, other: Any) -> "Condition":
        return self < _row(self.base.place, other) + 1


@dataclass(frozen=True, eq=False)
class Chunk(Symbol):
    """floor((k - base) / size)."""

    base: Row
    size: int
    given: frozenset[str]

    def __eq__(self, other: object) -> Any:
        first = self.base + _row(self.base.place, other) * self.size
        return Condition.between(first, first + self.size, self.given)


@dataclass(frozen=True, eq=False)
class Condition(Symbol):
    """For each query an interval of keys, low <= k < high, of which some keys are hidden.

    Attributes:
        low: None means no limit.
        high: None means no limit.
        visible: bool [B, M], the keys not hidden from all queries; None if all are visible.
        anchored: Every interval is empty or holds the query's own position, so that the union of
            two such intervals is an interval.
        given: What must be true of tables for this to be exact: DOCUMENTS, BLOCKS, POSITIONS.
    """

    place: Place
    low: Row | None = None
    high: Row | None = None
    visible: Tensor | None = None
    anchored: bool = True
    given: frozenset[str] = frozenset()

    @staticmethod
    def where(place: Place, truth: Tensor) -> "Condition":
        """All keys for the queries where `truth`, bool [B|1, N|1], none for the others."""
        end = place.first_key + place.n_keys
        return Condition(place, high=Row(place, rest=truth.long() * end))

    @staticmethod
    def between(low: Row | None, high: Row | None, given: frozenset[str]) -> "Condition":
        """The keys low <= k < high, one of which is a limit."""
        limit = high if low is None else low
        assert limit is not None
        place, here = limit.place, Row(limit.place, 1)
        below = low is None or ((d := low.less(here)) is not None and d <= 0)
        above = high is None or ((d := high.less(here)) is not None and d >= 1)
        return Condition(place, low, high, None, below and above, given)

    @property
    def device(self) -> torch.device:
        """Where masks made of this are."""
        return self.place.positions.device

    @property
    def never(self) -> bool:
        """Whether this is plainly never true."""
        return self.high is not None and self.high.less(Row(self.place)) == 0

    @property
    def always(self) -> bool:
        """Whether this is plainly always true."""
        return self.low is None and self.high is None and self.visible is None

    def __and__(self, other: Any) -> "Condition":
        other = _condition(self.place, other)
        low = self.low if other.low is None else other.low
        if self.low is not None and other.low is not None:
            low = _extreme(self.low, other.low, larger=True)
        high = self.high if other.high is None else other.high
        if self.high is not None and other.high is not None:
            high = _extreme(self.high, other.high, larger=False)
        visible = self.visible if other.visible is None else other.visible
        if self.visible is not None and other.visible is not None:
            visible = self.visible & other.visible
        given = self.given | other.given
        if DOCUMENTS in given:
            given = given - {POSITIONS}
        anchored = self.anchored and other.anchored
        return Condition(self.place, low, high, visible, anchored, given)

    def __or__(self, other: Any) -> "Condition":
        other = _condition(self.place, other)
        if self.never or other.always:
            return other
        if other.never or self.always:
            return self
        if self.visible is not None or other.visible is not None:
            raise UnreadableError("a union with single keys")
        given = self.given | other.given
        if DOCUMENTS in given:
            given = given - {DOCUMENTS} | {BLOCKS}
        anchored = self.anchored and other.anchored
        low = high = None
        if self.low is None and other.low is None:
            # Both begin with the first key, or are empty with high <= 0.
            if self.high is not None and other.high is not None:
                high = _extreme(self.high, other.high, larger=True)
        elif self.high is None and other.high is None:
            # Both end with the last key. One that begins beyond it is empty and loses the minimum.
            if self.low is not None and other.low is not None:
                low = _extreme(self.low, other.low, larger=False)
        elif _touching(self, other):
            low, high = _hull(self, other)
        elif anchored:
            low, high = _union(self, other)
        else:
            raise UnreadableError("a union that may not be an interval")
        return Condition(self.place, low, high, None, anchored, given)

    def __rand__(self, other: Any) -> "Condition":
        return self & other

    def __ror__(self, other: Any) -> "Condition":
        return self | other

    def bounds(self) -> Tensor:
        """The intervals as indices of keys: int32 [B|1, N|1, 2], within 0..M."""
        pair = torch.broadcast_tensors(*self.ends())
        first, n_keys = self.place.first_key, self.place.n_keys
        bounds = torch.stack(pair, dim=-1).clamp(first, first + n_keys)
        return (bounds - first if first else bounds).to(torch.int32)

    def ends(self) -> tuple[Tensor, Tensor]:
        """The intervals' low and high, with the first key and the last where there is no limit."""
        first, n_keys = self.place.first_key, self.place.n_keys
        low = Row(self.place, rest=first) if self.low is None else self.low
        high = Row(self.place, rest=first + n_keys) if self.high is None else self.high
        return low.value(), high.value()


def read(function: Callable[..., Any], place: Place) -> Condition | None:
    """The condition a mask function states, or None if it can not be read."""
    batch, head, query, key = Batch(), Symbol(), Row(place, 1), Key(Row(place))
    try:
        with _Lookups(place):
            condition = _condition(place, function(batch, head, query, key))
    # Whatever goes wrong in a function that was not written for symbols says only that: filling
    # the whole mask calls it again with tensors, and raises what is really wrong.
    except Exception:  # noqa: BLE001
        return None
    return None if POSITIONS in condition.given else condition


class _Lookups(TorchFunctionMode):
    """Lets tensors be indexed by symbols."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.place = place

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.Tensor.__getitem__:
            table, index = args
            if isinstance(index, Symbol):
                return _per_batch(self.place, table, index)
            if isinstance(index, tuple) and any(isinstance(i, Symbol) for i in index):
                return _entry(self.place, table, index)
        elif any(isinstance(argument, Symbol) for argument in args):
            return _combined(self.place, func.__name__, args)
        return func(*args, **(kwargs or {}))


def _per_batch(place: Place, table: Tensor, index: Symbol) -> "Row | Condition":
    """table[b] for a table of one number per row of the batch."""
    if not isinstance(index, Batch) or table.ndim != 1 or table.shape[0] < place.batch:
        raise UnreadableError("a table of another shape")
    values = table[: place.batch, None]
    if table.dtype == torch.bool:
        return Condition.where(place, values)
    return Row(place, rest=_integers(values).long())


def _entry(place: Place, table: Tensor, indices: tuple[Any, ...]) -> "Row | Entry | Condition":
    """table[b, q + shift] or table[b, k + shift]."""
    if len(indices) != 2 or not isinstance(indices[0], Batch):
        raise UnreadableError("a table of something else than queries or keys")
    if table.ndim != 2 or table.shape[0] < place.batch:
        raise UnreadableError("a table of another shape")
    index = indices[1]
    if isinstance(index, Key) and index.sign > 0:
        shift = Row(place).less(index.base)
        first = None if shift is None else place.first_key + shift
        if shift is None or first is None or first < 0 or table.shape[1] < first + place.n_keys:
            raise UnreadableError("a table that does not cover the keys")
        if table.dtype == torch.bool:
            visible = table[: place.batch, first : first + place.n_keys]
            return Condition(place, visible=visible, anchored=False)
        return Entry(place, _integers(table), shift)
    if isinstance(index, Row):
        shift = index.less(Row(place, 1))
        if shift is None:
            raise UnreadableError("a table read at a number of another table")
        if table.dtype == torch.bool:
            return Condition.where(place, _at_queries(place, table, shift))
        return Row(place, times=1, table=_integers(table), shift=shift)
    raise UnreadableError("a table read at something else")


def _at_queries(place: Place, table: Tensor, shift: int) -> Tensor:
    """table[b, q + shift]: [B, N]."""
    return table[: place.batch].index_select(1, place.positions[0] + shift)


def _times(values: Tensor, factor: int) -> Tensor:
    """The product, without a kernel for 1."""
    return values if factor == 1 else values * factor


def _integers(values: Tensor) -> Tensor:
    """The same tensor, if it holds integers."""
    if values.is_floating_point() or values.is_complex():
        raise UnreadableError("a fraction")
    return values


def _number(value: Any) -> int:
    """The same number, if it is one and an integer."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise UnreadableError("a factor that is not an integer")
    return value


def _row(place: Place, value: Any) -> Row:
    """An integer, a tensor of one integer, or a Row, as a Row."""
    if isinstance(value, Row):
        return value
    if isinstance(value, Tensor) and value.ndim == 0 and value.dtype != torch.bool:
        return Row(place, rest=_integers(value).to(place.positions.device).long()[None, None])
    return Row(place, rest=_number(value))


def _combined(place: Place, name: str, arguments: tuple[Any, ...]) -> Any:
    """What a function of PyTorch makes of symbols; `tensor | condition` is one."""
    if name not in OPERATIONS:
        raise UnreadableError(f"{name} of symbols")
    return OPERATIONS[name](*(_condition(place, value) for value in arguments))


def _condition(place: Place, value: Any) -> Condition:
    """A truth value, a tensor of one truth value, or a Condition, as a Condition."""
    if isinstance(value, Condition):
        return value
    if isinstance(value, Tensor) and value.ndim == 0 and value.dtype == torch.bool:
        return Condition.where(place, value.to(place.positions.device)[None, None])
    raise UnreadableError("not a condition")


def _extreme(a: Row, b: Row, *, larger: bool) -> Row:
    """The larger or the smaller of two numbers."""
    difference = a.less(b)
    if difference is not None:
        return a if (difference >= 0) == larger else b
    pick = torch.maximum if larger else torch.minimum
    return Row(a.place, rest=pick(a.value(), b.value()))


def _touching(a: Condition, b: Condition) -> bool:
    """Whether it is plain that both intervals have keys and share one or are neighbours."""

    def reaches(x: Row | None, y: Row | None, by: int) -> bool:
        return x is None or y is None or ((d := y.less(x)) is not None and d >= by)

    filled = reaches(a.low, a.high, 1) and reaches(b.low, b.high, 1)
    return filled and reaches(a.low, b.high, 0) and reaches(b.low, a.high, 0)


def _hull(a: Condition, b: Condition) -> tuple[Row | None, Row | None]:
    """From the smaller low to the larger high."""
    low = high = None
    if a.low is not None and b.low is not None:
        low = _extreme(a.low, b.low, larger=False)
    if a.high is not None and b.high is not None:
        high = _extreme(a.high, b.high, larger=True)
    return low, high


def _union(a: Condition, b: Condition) -> tuple[Row, Row]:
    """The union of two intervals that share a key unless one of them is empty."""
    (a_low, a_high), (b_low, b_high) = a.ends(), b.ends()
    a_empty, b_empty = a_low >= a_high, b_low >= b_high
    low = torch.where(a_empty, b_low, torch.where(b_empty, a_low, a_low.minimum(b_low)))
    high = torch.where(a_empty, b_high, torch.where(b_empty, a_high, a_high.maximum(b_high)))
    return Row(a.place, rest=low), Row(a.place, rest=high)
