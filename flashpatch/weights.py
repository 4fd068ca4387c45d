"""Whether somebody asks for attention weights, which only the original attention computes.

Most attention classes are told, or transformers' output hooks wait for what they return. Others
return the weights whenever they have them, and their models keep them if they were asked to: hooks
on the models take note of that.
"""

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.utils import output_capturing

from flashpatch.hooks import unhook
from flashpatch.inspection import places


def asked() -> bool:
    """Whether a model up the stack keeps attention weights."""
    return bool(_ASKED) or _are_collected()


# The models that run now and were asked for attention weights.
_ASKED: list[nn.Module] = []


def take_note(
    place: int | None, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Forward pre-hook that knows whether the model is asked.

    Args:
        place: Where `output_attentions` stands among its arguments, if it has that one.
        module: The model.
        args: Its own.
        kwargs: Its own.
    """
    if module in _ASKED:  # its last call was interrupted
        del _ASKED[_ASKED.index(module) :]
    wanted = kwargs.get("output_attentions")
    if place is not None and place < len(args):
        wanted = args[place]
    if wanted is None:
        wanted = getattr(getattr(module, "config", None), "output_attentions", False)
    if wanted:
        _ASKED.append(module)


def forget(module: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
    """Forward hook that ends it."""
    if module in _ASKED:
        del _ASKED[_ASKED.index(module) :]


def listen(model: nn.Module) -> None:
    """Hooks both to every transformers model within a module."""
    stop(model)
    for module in model.modules():
        if hasattr(module, "set_attn_implementation"):
            place = places(type(module)).get("output_attentions")
            module.register_forward_pre_hook(partial(take_note, place), with_kwargs=True)
            module.register_forward_hook(forget, always_call=True)


def stop(model: nn.Module) -> None:
    """Removes them."""
    for module in model.modules():
        unhook(module, take_note)
        unhook(module, forget)


def _are_collected() -> bool:
    """Whether transformers' output hooks record attention weights."""
    if torch.compiler.is_compiling():  # a context variable cannot be traced; this stands for it
        collector = getattr(_COLLECTOR, "global_var", None)
    else:
        collector = _COLLECTOR.get() if _COLLECTOR is not None else None
    return collector is not None and any("attentions" in name for name in collector)


_COLLECTOR: Any = getattr(output_capturing, "_active_collector", None)
