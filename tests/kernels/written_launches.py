"""Launchers that only write down, calls of which they do, and what tests compare of these."""

from typing import NamedTuple

import pytest
import torch
import triton
from torch import Tensor

from flashpatch_kernels import hopper
from flashpatch_kernels import triton as portable
from flashpatch_kernels.masks import Band, Intervals

BOTH = {"hopper": hopper, "triton": portable}
ENGINES = pytest.mark.parametrize("engine", BOTH.values(), ids=BOTH)
OPTIONS = {"mask": Band(right=0), "scale": 0.125}


class Launcher:
    """What Triton has between a kernel and its function in C, in the order that the latter takes.

    Attributes:
        launch: That function.
        global_scratch_size: Bytes that each program wants.
    """

    def __init__(self, launch, global_scratch_size=0):
        self.launch, self.global_scratch_size = launch, global_scratch_size

    def scratch(self, n_programs, stream):
        size = n_programs * self.global_scratch_size
        return triton.runtime._allocation._allocator.get()(size, 128, stream) if size else None


class Flat(Launcher):
    """As in Triton 3.6."""

    def __call__(self, x, y, z, stream, function, *rest):
        scratch = self.scratch(x, stream)
        self.launch(x, y, z, stream, function, False, False, scratch, None, *rest)


class Compiled:
    """What Triton compiled, as all its versions from 3.6 have it."""

    function, packed_metadata = "function", "metadata"

    def __init__(self, run=None):
        self.ran = []
        self.run = run or (lambda *arguments: self.ran.append(arguments))

    def __getitem__(self, grid):
        return lambda *arguments: self.ran.append((grid, *arguments))


class Launched(NamedTuple):
    again: bool
    arguments: tuple

    @property
    def numbers(self):
        """All but the tensors, whose places are empty."""
        return [None if isinstance(x, Tensor) else x for x in self.arguments]

    @property
    def leaves(self):
        """The arguments with those in tuples, one by one, where these begin and end as well."""
        found, rest = [], [*self.arguments]
        while rest:
            x = rest.pop(0)
            if type(x) is tuple:
                rest = ["(", *x, ")", *rest]
            else:
                found.append(x)
        return found

    def tensors(self):
        """In order."""
        return [x for x in self.arguments if isinstance(x, Tensor)]

    def addressed(self, tensors):
        """The same with the addresses of other tensors."""
        rest = iter(tensors)
        return tuple(next(rest).data_ptr() if isinstance(x, Tensor) else x for x in self.arguments)


def tensors(b=2, h=4, h_kv=2, n=300, m=333, d=128, dv=128, dtype=torch.bfloat16):
    """q, k and v as a projection lays them out."""
    shapes = (b, n, h, d), (b, m, h_kv, d), (b, m, h_kv, dv)
    return tuple(torch.randn(shape).to(dtype).transpose(1, 2) for shape in shapes)


def shifted(x):
    """The same numbers and strides at another multiple of 8 bytes than one of 16."""
    elements = 8 // x.element_size()
    whole = x.new_empty(x.untyped_storage().nbytes() // x.element_size() + elements)
    return whole.as_strided(x.shape, x.stride(), elements).copy_(x)


def spread(x):
    """The same numbers in rows that are further apart."""
    return torch.nn.functional.pad(x, (0, 8))[..., :-8]


def layout(x):
    return x.shape, x.stride(), x.dtype


def intervals(batch=2, n=300, runs=False):
    bounds = torch.randint(0, 333, (batch, n, 2), dtype=torch.int32)
    return Intervals(bounds, torch.randint(0, 333, (2, 333), dtype=torch.int32) if runs else None)


def table(entries=11, first=-5, dtype=torch.float32):
    return {"table": torch.randn(4, entries, dtype=dtype), "first": first}


def bias(*shape, dtype=torch.float32):
    return {"bias": torch.randn(shape, dtype=dtype)}


# What makes new tensors for a call, and the engines that serve it.
TERMS_OF_BOTH = {
    "slopes": lambda: {"slopes": torch.randn(4)},
    "a table": table,
    "a table in half": lambda: table(dtype=torch.bfloat16),
    "a table in columns": lambda: {"table": torch.randn(11, 4).T, "first": -5},
    "all distances": lambda: table(632, None),
    "keys": lambda: bias(2, 4, 1, 333),
    "keys in half": lambda: bias(1, 1, 1, 333, dtype=torch.bfloat16),
    "keys in columns": lambda: {"bias": torch.randn(1, 1, 333, 4).transpose(1, 3)},
    "all": lambda: table() | bias(2, 1, 1, 333) | {"slopes": torch.randn(4), "softcap": 9.0},
}
TERMS_OF_PORTABLE = {
    "pairs": lambda: bias(1, 4, 300, 333, dtype=torch.bfloat16),
    "pairs in columns": lambda: {"bias": torch.randn(1, 4, 333, 300).mT},
    "keys of every query": lambda: {"bias": torch.randn(2, 1, 1, 333).expand(2, 4, 300, 333)},
    "dropout": lambda: {"dropout": 0.1, "seed": torch.tensor([1])},
}
CASES = [
    *[(engine, name) for engine in BOTH for name in TERMS_OF_BOTH],
    *[("triton", name) for name in TERMS_OF_PORTABLE],
]
TERMS = TERMS_OF_BOTH | TERMS_OF_PORTABLE


def check_moved(again, anew, moved):
    """The same launches, but that memory of their own lies elsewhere, the same for all of them.

    `moved` are addresses by those that they have anew; it gets those of that memory.
    """
    for one, other in zip(again, anew, strict=True):
        for x, y in zip(one.leaves, other.leaves, strict=True):
            assert x == (moved.setdefault(y.data_ptr(), x) if isinstance(y, Tensor) else y)
    assert len(set(moved.values())) == len(moved)
