"""What a product of queries and keys has become: the terms of an attention, as an engine takes it.

Letters: N queries, M keys, D head size; `lead` the sizes before them, such as (B, H).
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flashpatch.dispatch import dropout_seed
from flashpatch.masks import read_once
from flashpatch_kernels.masks import Band, Boolean, Mask, intersect
from flashpatch_kernels.options import Options

Lead = tuple[int, ...]


class UnreadableError(Exception):
    """Something is done to a product that attention does not do."""


@dataclass(frozen=True, eq=False)
class Terms:
    """What a product has become: softmax(cap(q k^T * scale) + biases, masked), with dropout.

    Attributes:
        q: [*lead, N, D], each size of lead may be 1.
        k: [*lead, M, D], likewise.
        lead: The sizes before N and M as finely as the class has split them.
        shown: The same as the class has now merged them.
        rows: N as the class has now split it, such as (height, width); (N,) where it has not.
        columns: M, likewise.
        scale: Factor on q k^T.
        softcap: That of `Options`, of cap(s) = softcap * tanh(s / softcap); None is cap(s) = s.
        biases: Added to the scores, [*lead, N, M], each size may be 1.
        masks: bool, true where a key is seen, likewise; or int32 as `masks.pack` makes it.
        hidden: The tensors that said so, true where a key is hidden, as the class sees them.
        dtype: That which the class would have now.
        normal: Whether the logarithm of the sum of their exponentials was taken off the scores.
        softmax: Whether the softmax was taken.
        dropout: Probability.
    """

    q: Tensor
    k: Tensor
    lead: Lead
    shown: Lead
    rows: Lead
    columns: Lead
    scale: float = 1.0
    softcap: float | None = None
    biases: tuple[Tensor, ...] = ()
    masks: tuple[Tensor, ...] = ()
    hidden: tuple[Tensor, ...] = ()
    dtype: torch.dtype = torch.float32
    normal: bool = False
    softmax: bool = False
    dropout: float = 0.0

    @staticmethod
    def of(q: Tensor, k: Tensor) -> "Terms":
        """Those of q k^T for q [..., N, D] and k [..., M, D]."""
        lead = tuple(q.shape[:-2])
        if lead != k.shape[:-2]:
            lead = tuple(torch.broadcast_shapes(lead, k.shape[:-2]))
        dims = len(lead) + 2
        q, k = (x[(None,) * (dims - x.ndim)] for x in (q, k))
        return Terms(q, k, lead, lead, (q.shape[-2],), (k.shape[-2],), dtype=q.dtype)

    @property
    def sizes(self) -> tuple[int, int]:
        """N and M."""
        return self.q.shape[-2], self.k.shape[-2]

    @property
    def shape(self) -> torch.Size:
        """As the class sees it."""
        return torch.Size((*self.shown, *self.rows, *self.columns))

    @property
    def whole(self) -> bool:
        """Whether neither N nor M is split."""
        return len(self.rows) == len(self.columns) == 1

    def view(self, shape: Lead) -> "Terms":
        """With N and M split, or with other sizes before them; none is split and merged at once."""
        if -1 in shape:
            others = -math.prod(shape)
            shape = tuple(math.prod(self.shape) // others if s == -1 else s for s in shape)
        n, m = self.sizes
        lead, columns = tail(shape, m)
        lead, rows = tail(lead, n)
        if not lead:
            raise UnreadableError
        if groups(lead, self.lead) is not None:
            return replace(self, shown=lead, rows=rows, columns=columns, hidden=())
        if groups(self.lead, lead) is None:
            raise UnreadableError
        split = partial(spread, coarse=self.lead, fine=lead)
        return replace(
            self,
            q=split(self.q),
            k=split(self.k),
            lead=lead,
            shown=lead,
            rows=rows,
            columns=columns,
            hidden=(),
            biases=tuple(map(split, self.biases)),
            masks=tuple(m if m.dtype == torch.int32 else split(m) for m in self.masks),
        )

    def fitted(self, x: Tensor) -> Tensor:
        """A tensor that meets this one as it is shown, [*lead, N, M] with sizes of 1."""
        missing = len(self.shape) - x.ndim
        if missing < 0:
            raise UnreadableError
        x = spread(unexpanded(x)[(None,) * missing], coarse=self.shown, fine=self.lead)
        for place, sizes in ((-1, self.columns), (-2, self.rows)):
            x = joined(x, place, sizes)
        return x

    def scaled(self, factor: Any) -> "Terms":
        """Times a number, or a tensor that has one for each query."""
        if self.softmax or self.normal:
            raise UnreadableError
        if isinstance(factor, Tensor) and self.softcap is not None:
            factor = number(factor)
        if isinstance(factor, Tensor):
            factor = self.fitted(factor)
            if factor.shape[-1] != 1 or not factor.is_floating_point():
                raise UnreadableError
            q = self.q * factor.to(self.q.dtype)
            return replace(self, q=q, biases=tuple(b * factor for b in self.biases))
        if isinstance(factor, bool) or not isinstance(factor, int | float):
            raise UnreadableError
        biases = tuple(b * factor for b in self.biases)
        softcap = self.softcap
        if softcap is not None:
            if factor <= 0:
                raise UnreadableError
            softcap *= factor
        return replace(self, scale=self.scale * factor, softcap=softcap, biases=biases)

    def capped(self) -> "Terms":
        """The hyperbolic tangent of the scores."""
        if self.softmax or self.normal or self.masks or self.softcap is not None:
            raise UnreadableError
        terms = self.with_biases_in_product() if self.biases else self
        return replace(terms, softcap=1.0)

    def with_biases_in_product(self) -> "Terms":
        """The biases as parts of the product: q k^T + b is [q, b] [k, I]^T, I the unit matrix."""
        m = self.sizes[1]
        if m > FEW_KEYS or self.scale == 0:
            raise UnreadableError
        bias = sum(self.biases[1:], self.biases[0]) / self.scale
        shape = (*self.lead, *self.sizes)
        q = torch.cat((self.q.expand(*shape[:-1], -1), bias.to(self.q.dtype).expand(shape)), -1)
        unit = torch.eye(m, dtype=self.k.dtype, device=self.k.device)
        k = torch.cat((self.k, unit.expand(*self.k.shape[:-1], -1)), -1)
        return replace(self, q=q, k=k, biases=())

    def permuted(self, order: Lead) -> "Terms":
        """With the sizes before N and M in another order."""
        count = len(self.lead)
        order = tuple(place % (count + 2) for place in order)
        if self.shape != (*self.lead, *self.sizes) or order[count:] != (count, count + 1):
            raise UnreadableError
        if any(m.dtype == torch.int32 for m in self.masks):
            raise UnreadableError
        lead = tuple(self.lead[place] for place in order[:count])
        return replace(
            self,
            q=self.q.permute(order),
            k=self.k.permute(order),
            lead=lead,
            shown=lead,
            hidden=(),
            biases=tuple(b.permute(order) for b in self.biases),
            masks=tuple(m.permute(order) for m in self.masks),
        )

    def plus(self, x: Any) -> "Terms":
        """With a mask, a bias or a number added."""
        if self.softmax or self.normal:
            raise UnreadableError
        if isinstance(x, int | float):
            x = self.q.new_full((1, 1), x)
        if not isinstance(x, Tensor):
            raise UnreadableError
        if x.dtype == torch.int32 and x.ndim == 4 and self.whole:
            return replace(self, masks=(*self.masks, x))
        if not x.is_floating_point():
            raise UnreadableError
        return replace(self, biases=(*self.biases, self.fitted(x)))

    def seen_where(self, visible: Any) -> "Terms":
        """With the keys hidden that are not visible."""
        if self.softmax or self.normal:
            raise UnreadableError
        if not isinstance(visible, Tensor) or visible.dtype != torch.bool:
            raise UnreadableError
        return replace(self, masks=(*self.masks, self.fitted(visible)))

    def call(self, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Options]:
        """The attention on values [..., M, Dv], as an engine takes it."""
        merge = partial(in_four, lead=self.lead)
        n, m = self.sizes
        if v.ndim < len(self.shown) + 2:
            v = v[(None,) * (len(self.shown) + 2 - v.ndim)]
        v = spread(v, coarse=self.shown, fine=self.lead)
        if not self.softmax or not self.whole or v.shape[-2] != m:
            raise UnreadableError
        q = merge(self.q.expand(*self.lead, *self.q.shape[-2:]))
        k, v = merge(self.k), merge(v)
        batch = q.shape[0]
        heads = max(k.shape[1], v.shape[1])
        k, v = (x.expand(batch, heads, -1, -1) for x in (k, v))
        bias = None
        for b in self.biases:
            bias = merge(b) if bias is None else bias + merge(b)
        if bias is not None and bias.shape[-1] == 1:
            bias = bias.expand(-1, -1, -1, m)
        mask: Mask = Band()
        for each in self.masks:
            if each.dtype == torch.int32:
                other = read_once(each, n, m)
            else:
                seen = merge(each)
                other = Boolean(seen.expand(*seen.shape[:3], m))
            mask = intersect(mask, other, n, m, q.device)
        options = Options(
            mask=mask,
            scale=self.scale,
            softcap=self.softcap,
            bias=bias,
            dropout=self.dropout,
            seed=dropout_seed(self.dropout, q.device),
        )
        return q.to(v.dtype), k.to(v.dtype), v, options


# So many keys may be dimensions of a product; with more of them it would be larger than the scores.
FEW_KEYS = 64


def note_constant(x: Tensor, value: float) -> None:
    """Keeps with a tensor the one number that it holds, until it is changed."""
    x._flashpatch_constant = _version(x), value  # pyright: ignore[reportAttributeAccessIssue]


def constant(x: Any) -> Any:
    """The number that a tensor is known to hold; anything else as it is."""
    version, value = getattr(x, "_flashpatch_constant", (None, x))
    # what is traced has no versions, and its constants are made in the trace
    known = torch.compiler.is_compiling() or version is None or version == _version(x)
    return value if known else x


def _version(x: Tensor) -> int:
    return 0 if torch.compiler.is_compiling() or x.is_inference() else x._version


def number(x: Tensor) -> float:
    """The value of a tensor of one number that is a constant, read from its device once.

    What torch.compile traces has no values.
    """
    if x.numel() != 1 or x.requires_grad or torch.compiler.is_compiling():
        raise UnreadableError
    if isinstance(constant(x), Tensor):
        note_constant(x, x.item())
    return constant(x)


@dataclass(frozen=True, eq=False)
class PerQuery:
    """One number for each query of a product's scores, the last size 1.

    Attributes:
        terms: The product.
        normaliser: Whether it is the logarithm of the sum of the scores' exponentials.
        kept: Whether the last size is there already.
    """

    terms: Terms
    normaliser: bool = False
    kept: bool = True


def unexpanded(x: Tensor) -> Tensor:
    """The same without the sizes that it was only expanded to."""
    for place, (size, stride) in enumerate(zip(x.shape, x.stride(), strict=True)):
        if size > 1 and stride == 0:
            x = x.narrow(place, 0, 1)
    return x


def tail(shape: Lead, size: int) -> tuple[Lead, Lead]:
    """The sizes in two: the fewest at the end whose product is `size`, behind the others."""
    product = 1
    for at in range(len(shape) - 1, -1, -1):
        product *= shape[at]
        if product == size:
            return tuple(shape[:at]), tuple(shape[at:])
    raise UnreadableError


def joined(x: Tensor, place: int, sizes: Lead) -> Tensor:
    """X with those sizes, of which it may have 1 instead, as one that ends at `place`."""
    if len(sizes) == 1:
        return x
    after = x.ndim + place + 1
    start = after - len(sizes)
    given = x.shape[start:after]
    if any(had not in (1, size) for had, size in zip(given, sizes, strict=True)):
        raise UnreadableError
    if not all(had == 1 for had in given):
        x = x.expand(*x.shape[:start], *sizes, *x.shape[after:])
    return x.flatten(start, after - 1)


def groups(coarse: Lead, fine: Lead) -> list[int] | None:
    """How many sizes of `fine`, side by side, each of `coarse` is the product of, if it is."""
    counts, at = [], 0
    for left, size in zip(range(len(coarse) - 1, -1, -1), coarse, strict=True):
        start, product = at, 1
        while at < len(fine) and (at == start or product < size):
            product *= fine[at]
            at += 1
        while product == size and len(fine) - at > left and fine[at] == 1:
            at += 1
        if product != size:
            return None
        counts.append(at - start)
    return counts if at == len(fine) else None


def spread(x: Tensor, *, coarse: Lead, fine: Lead) -> Tensor:
    """X [*coarse, ...], of which sizes may be 1, as [*fine, ...]."""
    if coarse == fine:
        return x
    counts = groups(coarse, fine)
    if counts is None:
        raise UnreadableError
    shape: list[int] = []
    at = 0
    for place, (size, count) in enumerate(zip(coarse, counts, strict=True)):
        if x.shape[place] not in (1, size):
            raise UnreadableError
        shape += fine[at : at + count] if x.shape[place] == size else (1,) * count
        at += count
    return x.reshape(*shape, *x.shape[len(coarse) :])


def in_four(x: Tensor, *, lead: Lead) -> Tensor:
    """X [*lead, ...] with sizes of 1 as [B|1, H|1, ...]: all but the last of `lead` merged."""
    rest = x.shape[len(lead) :]
    if len(lead) == 1:
        return x[:, None]
    outer, heads = x.shape[: len(lead) - 1], x.shape[len(lead) - 1]
    if len(outer) == 1:
        return x
    if all(size == 1 for size in outer):
        return x.reshape(1, heads, *rest)
    return x.expand(*lead[:-1], heads, *rest).reshape(-1, heads, *rest)
