"""Memory for what a kernel writes, from torch's allocator, past the dispatcher.

On the way through the dispatcher a small kernel's outputs take as long as its launch.
"""

import torch
from torch import Tensor
from torch._C._dynamo import guards


def empty(
    size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Unwritten memory on a device; on a card, which must be the current one.

    What allocates it there is what the code that Inductor writes uses, in torch builds for cards:
    on the current stream, and an inference tensor in inference mode.
    """
    # Only a card has a number; to ask for the type would take longer.
    if device.index is None or _EMPTY_ON_CARD is None:
        return torch.empty_strided(size, stride, dtype=dtype, device=device)
    return _EMPTY_ON_CARD(size, stride, dtype)


def empty_bytes(n: int, device: torch.device) -> Tensor:
    """As much unwritten memory, likewise."""
    return empty((n,), (1,), torch.int8, device)


_EMPTY_ON_CARD = getattr(guards, "_empty_strided_cuda", None)
