"""What stands for a product of tensors while a class that computes attention is read.

See `flashpatch.reading`. What a product has become is in `flashpatch.scores`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function
from torch.utils._pytree import tree_map

from flashpatch.masks import expand
from flashpatch.scores import PerQuery, Terms


class Product:
    """Stands for a product of tensors and for what becomes of it; computed only where it must be.

    Attributes:
        replay: Computes it as the class would have.
        terms: What it is; None where that is not known.
        is_weights: Whether a softmax was taken on the way here.
        per_query: What it is instead, if it has one number for each query.
    """

    def __init__(
        self,
        replay: Callable[[], Tensor],
        terms: Terms | None,
        is_weights: bool = False,
        per_query: PerQuery | None = None,
    ) -> None:
        self.replay = replay
        self.terms = terms
        self.is_weights = is_weights
        self.per_query = per_query
        self.computed: Tensor | None = None

    def compute(self) -> Tensor:
        """The tensor itself."""
        if self.computed is None:
            # a `Reading` that goes on would only make a product of it again
            with torch._C.DisableTorchFunction():  # pyright: ignore[reportPrivateUsage]
                self.computed = self.replay()
            self.terms = None
        return self.computed

    def copy(self) -> "Product":
        """The same, for when this one is changed in place."""
        return Product(self.replay, self.terms, self.is_weights)

    @property
    def shape(self) -> torch.Size:
        """As a tensor's."""
        return self.compute().shape if self.terms is None else self.terms.shape

    @property
    def dtype(self) -> torch.dtype:
        """As a tensor's."""
        return self.compute().dtype if self.terms is None else self.terms.dtype

    @property
    def device(self) -> torch.device:
        """As a tensor's."""
        return self.compute().device if self.terms is None else self.terms.q.device

    @property
    def ndim(self) -> int:
        """As a tensor's."""
        return len(self.shape)

    def dim(self) -> int:
        """As a tensor's."""
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        """As a tensor's."""
        return self.shape if dim is None else self.shape[dim]

    def __getattr__(self, name: str) -> Any:
        function = getattr(torch.Tensor, name)
        if not callable(function):
            return getattr(self.compute(), name)
        return partial(handle_torch_function, function, (self,), self)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """What a function makes of products outside of a `Reading`: the tensors'."""
        return func(*computed(args), **computed(kwargs or {}))


def _operator(name: str) -> Callable[..., Any]:
    def operate(self: Product, *args: Any) -> Any:
        return handle_torch_function(getattr(torch.Tensor, name), (self, *args), self, *args)

    return operate


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "matmul"):
    setattr(Product, f"__{_name}__", _operator(f"__{_name}__"))
for _name in ("rmatmul", "neg", "getitem", "setitem", "lt", "le", "gt", "ge", "pow"):
    setattr(Product, f"__{_name}__", _operator(f"__{_name}__"))


def computed(tree: Any) -> Any:
    """The same with tensors in the place of products."""
    return released(tree, weights=True)


def released(tree: Any, *, weights: bool) -> Any:
    """What a class returns, without products; attention weights are None unless `weights`."""
    kind = type(tree)
    if kind is Product:
        return tree.compute() if weights or not tree.is_weights else None
    if kind is tuple or kind is list:  # plain loops: this runs for every operation that is read
        return kind([released(x, weights=weights) for x in tree])
    if kind is dict:
        return {name: released(x, weights=weights) for name, x in tree.items()}
    if isinstance(tree, tuple | list | dict):
        return tree_map(lambda x: released(x, weights=weights) if type(x) is Product else x, tree)
    return tree


def replayed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """A function on tensors, where a compact mask that is added is one of numbers to add."""
    args = computed(args)
    if func in _ADDITIONS and len(args) > 1:
        args = tuple(_as_numbers(x, args[1 - i]) if i < 2 else x for i, x in enumerate(args))
    return func(*args, **computed(kwargs))


def _as_numbers(mask: Any, scores: Any) -> Any:
    if not isinstance(mask, Tensor) or mask.dtype != torch.int32 or mask.ndim != 4:
        return mask
    n, m = scores.shape[-2:]
    return expand(mask, n, m, scores, causal=False, additive=True)


_ADDITIONS = frozenset(
    (torch.add, torch.Tensor.add, torch.Tensor.add_, torch.Tensor.__add__, torch.Tensor.__radd__)
)


def under_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as a product takes them under autocast, which differ in dtype before at times."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    eligible = (torch.float16, torch.bfloat16, torch.float32)
    return tuple(x.to(dtype) if x.dtype in eligible else x for x in tensors)
