"""Small calls of the public function: the sizes, tensors and terms that its tests share."""

import torch

from flashpatch_kernels.options import Relative

B, H, H_KV, N, M, D, DV = 2, 4, 2, 6, 8, 16, 16


def tensors(n=N, m=M, *, dtype=torch.float32, grad=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((B, H, n, D), (B, H_KV, m, D), (B, H_KV, m, DV))
    return tuple(
        torch.randn(*shape, generator=generator).to(dtype).requires_grad_(grad) for shape in shapes
    )


def terms(n=N, m=M, *, grad=False):
    generator = torch.Generator().manual_seed(1)
    shapes = {"table": (H, n + m - 1), "bias": (1, H, 1, m), "sinks": (H,)}
    return {
        name: torch.randn(*shape, generator=generator).requires_grad_(grad)
        for name, shape in shapes.items()
    }


def vectors(n=N, m=M, *, grad=False):
    """Every term by distance that is clamped at its ends."""
    generator = torch.Generator().manual_seed(2)

    def random(*shape):
        return torch.randn(*shape, generator=generator).requires_grad_(grad)

    return {
        "table": random(H, 3),
        "first": -1,
        "relative_queries": Relative(random(H, 5, 3), -2, random(B, H, n, 3)),
        "relative_keys": Relative(random(1, 4, 2), -3, random(B, H, m, 2)),
        "relative_values": Relative(random(1, 1, DV), 0),
    }
