"""Exact attention in linear memory for PyTorch: the function, its masks and its engines."""

from flashpatch_kernels.masks import Band, Boolean, Intervals, Mask
from flashpatch_kernels.op import attention, attention_varlen
from flashpatch_kernels.options import Options, Relative, Score

__all__ = [
    "Band",
    "Boolean",
    "Intervals",
    "Mask",
    "Options",
    "Relative",
    "Score",
    "attention",
    "attention_varlen",
]
