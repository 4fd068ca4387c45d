"""Exact, IO-aware tiled attention for Hugging Face models: one call patches, one undoes.

    report = flashpatch.apply(model)
    flashpatch.revert(model)

Nothing is changed by the import. Names load when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashpatch.architectures import coverage
    from flashpatch.enabling import disable, enable
    from flashpatch.notebook import load_ipython_extension, unload_ipython_extension
    from flashpatch.patching import applied, apply, revert
    from flashpatch.registry import Patch, register
    from flashpatch.report import Report
    from flashpatch_kernels import attention
    from flashpatch_kernels.engines import Reason

__version__ = "0.1.0"

__all__ = [
    "Patch",
    "Reason",
    "Report",
    "applied",
    "apply",
    "attention",
    "coverage",
    "disable",
    "enable",
    "load_ipython_extension",
    "register",
    "revert",
    "unload_ipython_extension",
]

_HOMES = {
    "Patch": "flashpatch.registry",
    "Reason": "flashpatch_kernels.engines",
    "Report": "flashpatch.report",
    "applied": "flashpatch.patching",
    "apply": "flashpatch.patching",
    "attention": "flashpatch_kernels",
    "coverage": "flashpatch.architectures",
    "disable": "flashpatch.enabling",
    "enable": "flashpatch.enabling",
    "load_ipython_extension": "flashpatch.notebook",
    "register": "flashpatch.registry",
    "revert": "flashpatch.patching",
    "unload_ipython_extension": "flashpatch.notebook",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'flashpatch' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
