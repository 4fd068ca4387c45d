"""What was last found for some tensors, found again for others like them by one call of C.

To ask tensors for what decides, and to look that up, takes a good part of a short call. The guards
here are those by which code that Dynamo compiled knows the calls that it was compiled for.
"""

from typing import Any, Generic, TypeVar

from torch import Tensor
from torch._C._dynamo import guards

T = TypeVar("T")


class Recent(Generic[T]):
    """What was last noted for some tensors.

    Others are like them if each has the type, dtype, device, shape and strides of the one in its
    place, needs a gradient or not as that one does, and stands in one place only, under the same of
    torch's modes. Addresses are not looked at. No tensor is kept alive.
    """

    def __init__(self) -> None:
        # A pair, so that no thread sees the guards of one call with what another has noted.
        self._last: tuple[Any, T] | None = None

    def found(self, *tensors: Tensor) -> T | None:
        """What was noted, if it was for as many tensors like these."""
        if self._last is None:
            return None
        made, noted = self._last
        try:
            return noted if made.check(*tensors) else None
        except TypeError:  # another number of them, or what is no tensor
            return None

    def note(self, found: T, *tensors: Tensor) -> None:
        """Notes this in the place of what was noted before."""
        made = _guards(*tensors)
        self._last = None if made is None else (made, found)


def _guards(*tensors: Tensor) -> Any:
    """What knows tensors like these; None in a torch that has it no more, or not in this way."""
    try:
        return guards.TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
    except (AttributeError, TypeError):
        return None
