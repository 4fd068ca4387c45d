"""Attention classes that are left to transformers on purpose, each with the reason."""

from flashpatch_kernels.engines import Reason

LEFT: dict[str, Reason] = {}
