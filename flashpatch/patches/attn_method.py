"""Classes whose `forward` leaves attention to a method `_attn(query, key, value, attention_mask)`.

`_attn` is replaced. What it needs to know beyond its arguments, only `forward` is told, which is
therefore wrapped to pass it on with the mask.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from flashpatch.dispatch import DEFAULT, Settings, attend, fall_back
from flashpatch.masks import expand
from flashpatch.patches.interface import is_causal, read_call, why_blocked
from flashpatch.registry import Patch, register


@dataclass(frozen=True)
class Kind:
    """How one layer differs from causal attention.

    Attributes:
        scale: Factor on the products.
        window: How many keys a query sees, its own included; None for all up to its own.
        transposed: As GPT has it: keys are given as [B, H, D, M], the mask hides padding alone, and
            the result is a list.
    """

    scale: float
    window: int | None = None
    transposed: bool = False


def _openai(module: Any) -> Kind:
    size = module.split_size // module.n_head
    return Kind(scale=size**-0.5 if module.scale else 1.0, transposed=True)


def _gpt_neo(module: Any) -> Kind:
    local = module.attention_type == "local"
    return Kind(scale=1.0, window=module.config.window_size if local else None)


def _gptj(module: Any) -> Kind:
    return Kind(scale=1 / module.scale_attn)


CLASSES: dict[str, Callable[[Any], Kind]] = {
    "gpt_neo.modeling_gpt_neo.GPTNeoSelfAttention": _gpt_neo,
    "gptj.modeling_gptj.GPTJAttention": _gptj,
    "openai.modeling_openai.Attention": _openai,
}


@dataclass(frozen=True)
class Passed:
    """An attention mask, and what else `forward` was told that concerns attention."""

    mask: Tensor | None
    output_attentions: bool | None
    position_ids: Tensor | None


def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The class's own `forward`, with what `_attn` must know passed along."""
    kwargs["attention_mask"] = Passed(
        kwargs.get("attention_mask"), kwargs.get("output_attentions"), kwargs.get("position_ids")
    )
    cls: Any = type(module)
    return cls.forward(module, *args, **kwargs)


def attn(
    kind: Kind,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Passed,
    *args: Any,
) -> Sequence[Tensor | None]:
    """Stands for `_attn`.

    Args:
        kind: Facts about the layer.
        module: The attention module.
        query: [B, H, N, D].
        key: [B, H, M, D], or as the kind says.
        value: [B, H, M, D].
        attention_mask: What `forward` passed.
        args: What else the class passes to its own.

    Returns:
        The output [B, H, N, D], and the attention weights where the original computes them.
    """
    settings: Settings = getattr(module, "_flashpatch", DEFAULT)
    cls: Any = type(module)
    mask = attention_mask.mask
    causal = kind.transposed or is_causal(module, query.shape[2], mask)

    def original() -> Sequence[Tensor | None]:
        if kind.transposed:
            return cls._attn(module, query, key, value, mask, *args)
        dense = expand(mask, query.shape[2], key.shape[2], query, causal=causal, additive=True)
        return cls._attn(module, query, key, value, dense)

    arguments = {
        "dropout": module.attn_dropout.p if module.attn_dropout.training else 0.0,
        "output_attentions": attention_mask.output_attentions,
        "position_ids": attention_mask.position_ids,
        "scaling": kind.scale,
    }
    blocked = why_blocked(module, settings, arguments)
    if blocked is not None:
        return fall_back(blocked, settings, original)
    keys = key.transpose(2, 3) if kind.transposed else key
    q, k, v, options = read_call(
        query, keys, value, mask, causal, settings, arguments, window=kind.window
    )
    out = attend(q, k, v, options, settings, original)
    if not isinstance(out, Tensor):
        return out
    return [out] if kind.transposed else (out, None)


def _register(name: str, kind: Callable[[Any], Kind]) -> None:
    register(
        Patch(
            f"transformers.models.{name}",
            swaps={
                "_attn": lambda module: partial(attn, kind(module), module),
                "forward": lambda module: partial(forward, module),
            },
        )
    )


for _name, _kind in CLASSES.items():
    _register(_name, _kind)
