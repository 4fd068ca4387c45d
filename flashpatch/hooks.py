"""Taking hooks of ours off a module, known by the function that they call."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn


def unhook(module: nn.Module, function: Callable[..., Any]) -> None:
    """Removes the forward hooks, of before and after, that are this function or a partial of it."""
    for hooks, flags in (
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        (module._forward_hooks, module._forward_hooks_always_called),
    ):
        for ident in [i for i, hook in hooks.items() if _called(hook) is function]:
            del hooks[ident]
            flags.pop(ident, None)


def _called(hook: Any) -> Any:
    return hook.func if isinstance(hook, partial) else hook
