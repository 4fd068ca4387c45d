"""Which engine serves a call of a patched module, or why the original attention does.

The only place where a fallback is decided. Everything is decided from metadata (shapes, dtypes,
devices, options), never from data, so that compile, graphs and checkpoint recompute agree.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor

from flashpatch_kernels import decisions
from flashpatch_kernels.engines import TILED, Call, Engine, Reason, choose, why_not
from flashpatch_kernels.op import run
from flashpatch_kernels.options import Options

T = TypeVar("T")
OnFallback = Callable[[Reason], object]

SKIPPED = Reason("SKIPPED", "left alone by `only` or `skip`")
OUTPUT_ATTENTIONS = Reason(
    "OUTPUT_ATTENTIONS", "attention weights were asked for, which only the original computes"
)
HEAD_MASK = Reason("HEAD_MASK", "a head mask was passed, which only the original applies")
UNREAD = Reason(
    "UNREAD", "nothing that its class computed could be read as attention; it ran as written"
)


def unknown_argument(name: str) -> Reason:
    """The reason of a call that carries an argument which might change its result."""
    return Reason("UNKNOWN_ARGUMENT", f"the model passed `{name}`, which flashpatch does not know")


_LOG = logging.getLogger("flashpatch")


@cache
def log_once(reason: Reason) -> None:
    """The default `on_fallback`: one warning per reason and process."""
    _LOG.warning("a call fell back to the original attention: %s [%s]", reason.text, reason.name)


@dataclass(frozen=True)
class Settings:
    """What `apply` decided for one attention module.

    Attributes:
        active: False for a module that `only` or `skip` leaves alone.
        original: Name of the attention that the module used before, e.g. "sdpa".
        on_fallback: Called with the reason of each call that runs the original attention.
        packing: "position_ids" separates packed documents wherever position ids restart.
    """

    active: bool = True
    original: str = "sdpa"
    on_fallback: OnFallback = log_once
    packing: str | None = None


# Of a model built with the key `fpatch` that `apply` has not seen.
DEFAULT = Settings()


def decide(call: Call) -> Engine | Reason:
    """The engine for a call, or why there is none: tiled takes all that any engine takes."""
    return why_not(TILED, call) or choose(call)


def decided(
    q: Tensor, k: Tensor, v: Tensor, options: Options, *, lse: bool = False
) -> Engine | Reason:
    """As `decide`, asked once for calls that are alike."""
    recent, given = decisions.recent_of_options(q, k, v, options, lse=lse)
    found = None if recent is None else recent.found(*given)
    if found is None:
        found = decide(Call.of(q, k, v, options, lse=lse))
        if recent is not None:
            recent.note(found, *given)
    return found


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: Options,
    settings: Settings,
    fallback: Callable[[], T],
) -> Tensor | T:
    """Runs the call on the engine of choice, or falls back if there is none.

    Args:
        q: [B, H, N, D].
        k: [B, H_kv, M, D].
        v: [B, H_kv, M, Dv].
        options: The rest of the call.
        settings: Those of the module that makes the call.
        fallback: Runs the original attention.

    Returns:
        The engine's output [B, H, N, Dv], or whatever `fallback` returned.
    """
    chosen = decided(q, k, v, options)
    if isinstance(chosen, Reason):
        return fall_back(chosen, settings, fallback)
    out, _ = run(q, k, v, options, chosen.name)
    return out


Part = tuple[Tensor, Tensor, Tensor, Options]


def attend_parts(
    parts: Sequence[Part], settings: Settings, *, lse: bool
) -> list[tuple[Tensor, Tensor | None]] | None:
    """Runs several calls on engines, or none of them if one cannot be served.

    Args:
        parts: q, k, v and options of each, as `attend` takes them.
        settings: Those of the module that makes the calls.
        lse: Whether their log-sum-exps are wanted.

    Returns:
        Output [B, H, N, Dv] and log-sum-exp [B, H, N] of each, -inf where a query sees no key.
    """
    engines = []
    for part in parts:
        chosen = decided(*part, lse=lse)
        if isinstance(chosen, Reason):
            return fall_back(chosen, settings, lambda: None)
        engines.append(chosen.name)
    return [run(*part, engine) for part, engine in zip(parts, engines, strict=True)]


def fall_back(reason: Reason, settings: Settings, fallback: Callable[[], T]) -> T:
    """Runs the original attention, after telling `on_fallback` why."""
    # a skipped module is the user's wish, not a fallback; a callback would break the graph
    if reason is not SKIPPED and not torch.compiler.is_compiling():
        settings.on_fallback(reason)
    return fallback()


def dropout_seed(p: float, device: torch.device) -> Tensor | None:
    """A seed from torch's generator, which checkpointing replays: int64 [1], None for p = 0."""
    return torch.randint(2**62, (1,), device=device) if p > 0 else None
