"""Exact attention in linear memory for PyTorch: the function, its masks and its engines."""

from flashpatch_kernels.masks import Band, Boolean, Intervals, Mask
from flashpatch_kernels.op import attention, attention_varlen
from flashpatch_kernels.options import Options

__all__ = ["Band", "Boolean", "Intervals", "Mask", "Options", "attention", "attention_varlen"]
