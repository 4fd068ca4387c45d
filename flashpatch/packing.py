"""The warning that packed documents may leak into each other.

transformers separates packed documents only where `position_ids` come alone: beside an attention
mask, or with a cache, its masks let documents see each other. Whether position ids restart is in
the data, which is not read; that they were passed in such a way can be seen by a hook.
"""

import warnings
from functools import cache
from typing import Any

import torch
from torch import nn

from flashpatch.hooks import unhook

LEAK = (
    "position_ids were passed beside an attention mask or with use_cache on: if they restart for "
    "packed documents, the model's own masks let the documents see each other. "
    'flashpatch.apply(model, packing="position_ids") separates them.'
)


def warn_of_leaks(module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook that warns, once per process, of a call that may hold packed documents."""
    positions = kwargs.get("position_ids")
    if torch.compiler.is_compiling() or not isinstance(positions, torch.Tensor):
        return
    if positions.ndim != 2 or positions.shape[1] == 1 or kwargs.get("past_key_values") is not None:
        return
    use_cache = kwargs.get("use_cache")
    if use_cache is None:
        use_cache = getattr(getattr(module, "config", None), "use_cache", False)
    if kwargs.get("attention_mask") is not None or use_cache:
        _warn_once()


@cache
def _warn_once() -> None:
    warnings.warn(LEAK, UserWarning, stacklevel=4)


def watch(module: nn.Module) -> None:
    """Hooks the warning to a model, if it is not there yet."""
    if warn_of_leaks not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(warn_of_leaks, with_kwargs=True)


def unwatch(module: nn.Module) -> None:
    """Removes the hook."""
    unhook(module, warn_of_leaks)
