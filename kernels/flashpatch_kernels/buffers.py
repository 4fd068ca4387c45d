"""Memory that the tiles of a call take in turns, for engine `tiled`: no tile allocates its own."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Buffers:
    """Memory by name, as large as the largest tile has asked for."""

    dtype: torch.dtype
    device: torch.device
    memory: dict[str, Tensor] = field(default_factory=dict)
    zeroed: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Memory of this shape that stays the same from tile to tile."""
        size = math.prod(shape)
        memory = self.memory.get(name)
        if memory is None or memory.numel() < size:
            memory = torch.empty(size, dtype=self.dtype, device=self.device)
            self.memory[name] = memory
        return memory[:size].view(shape)

    def zeros(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Zeros, but for what was written since the name was last asked for in another shape.

        For tiles that each write the same part, all of it, and read gaps between as zeros.
        """
        memory = self.get(name, shape)
        if self.zeroed.get(name) != shape:
            memory.zero_()
            self.zeroed[name] = shape
        return memory
