"""What `apply` did, told per group of modules: who serves it, or why it is left."""

import html
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from flashpatch.dispatch import SKIPPED, decide
from flashpatch_kernels.engines import Call, Reason
from flashpatch_kernels.masks import Band, Intervals


@dataclass(frozen=True)
class Served:
    """The engines that the calls of a module will run on, as far as can be told without a call.

    Attributes:
        plain: Name of the engine for a long batch without padding.
        padded: Name of the engine for the same batch with padding.
    """

    plain: str
    padded: str

    def __str__(self) -> str:
        same = self.plain == self.padded
        return self.plain if same else f"{self.plain} (padded: {self.padded})"


@dataclass(frozen=True)
class Row:
    """One attention module, or with `count` a group of them that differ in their numbers only."""

    pattern: str
    class_name: str
    outcome: Served | Reason
    count: int = 1

    @property
    def verdict(self) -> str:
        """The last column."""
        if isinstance(self.outcome, Served):
            return f"runs on {self.outcome}"
        return f"left: {self.outcome.text}"


@dataclass(frozen=True)
class Report:
    """What `apply` found in a model; prints as a table.

    Attributes:
        rows: One for each group of alike modules: pattern, class, engine or reason, count.
    """

    rows: tuple[Row, ...]

    @classmethod
    def of(cls, rows: Iterable[Row]) -> "Report":
        """Groups rows whose names differ only in their numbers."""
        groups: dict[Row, int] = {}
        for row in rows:
            pattern = re.sub(r"(^|(?<=\.))\d+(?=\.|$)", "*", row.pattern)
            group = Row(pattern or "(the model itself)", row.class_name, row.outcome)
            groups[group] = groups.get(group, 0) + row.count
        return cls(tuple(Row(g.pattern, g.class_name, g.outcome, n) for g, n in groups.items()))

    @property
    def served(self) -> int:
        """How many attention modules flashpatch serves."""
        return sum(row.count for row in self.rows if isinstance(row.outcome, Served))

    @property
    def total(self) -> int:
        """How many attention modules there are."""
        return sum(row.count for row in self.rows)

    @property
    def reasons(self) -> dict[Reason, list[str]]:
        """Why modules are left: each reason with the patterns of its modules."""
        reasons: dict[Reason, list[str]] = {}
        for row in self.rows:
            if isinstance(row.outcome, Reason):
                reasons.setdefault(row.outcome, []).append(row.pattern)
        return reasons

    def _headline(self) -> str:
        if not self.rows:
            return "flashpatch: no attention modules found"
        return f"flashpatch serves {self.served} of {self.total} attention modules"

    def __str__(self) -> str:
        cells = [(r.pattern, r.class_name, f"x{r.count}", r.verdict) for r in self.rows]
        widths = [max((len(c[i]) for c in cells), default=0) for i in range(3)]
        lines = ("  ".join([*map(str.ljust, c, widths), c[3]]) for c in cells)
        return "\n".join([self._headline(), *(f"  {line}" for line in lines)])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{h}</th>" for h in ("modules", "class", "count", ""))
        body = "".join(
            f"<tr><td><code>{html.escape(r.pattern)}</code></td>"
            f"<td>{html.escape(r.class_name)}</td><td>{r.count}</td>"
            f"<td>{html.escape(r.verdict)}</td></tr>"
            for r in self.rows
        )
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        return f"<p><b>{html.escape(self._headline())}</b></p>{table if self.rows else ''}"


_HEAD_SIZE = ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size")
_LENGTH = 4096

# Terms of a call that can be told from its module: (field of Call, predicate over the module).
_TERMS: tuple[tuple[str, Callable[[nn.Module], bool]], ...] = (
    ("softcap", lambda m: getattr(m, "attn_logit_softcapping", None) is not None),
    ("sinks", lambda m: "sinks" in dict(m.named_parameters(recurse=False))),
    ("table", lambda m: hasattr(m, "relative_attention_num_buckets") and not crosses(m)),
    ("relative", lambda m: any(hasattr(m, name) for name in _RELATIVE)),
)

# What modules with vectors by distance have: DeBERTa, Shaw and Transformer-XL.
_RELATIVE = ("pos_dropout", "distance_embedding", "pos_bias_u")


def crosses(module: nn.Module) -> bool:
    """Whether a T5-like module is cross-attention, which has no position bias."""
    return getattr(module, "is_decoder", False) and not getattr(module, "is_causal", True)


def describe(module: nn.Module, active: bool) -> Served | Reason:
    """What will serve the module's calls: a prediction from its attributes and first parameter."""
    if not active:
        return SKIPPED
    plain, padded = (decide(_nominal_call(module, padded)) for padded in (False, True))
    if isinstance(plain, Reason):
        return plain
    return padded if isinstance(padded, Reason) else Served(plain.name, padded.name)


def _nominal_call(module: nn.Module, padded: bool) -> Call:
    """A long training call of this module, with or without padded keys."""
    parameter = next(module.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    dtype = torch.float32 if parameter is None else parameter.dtype
    size = next((s for n in _HEAD_SIZE if isinstance(s := getattr(module, n, None), int)), 64)
    causal = bool(getattr(module, "is_causal", False))
    terms: dict[str, Any] = {term: has(module) for term, has in _TERMS}
    return Call(
        device=device.type,
        dtype=dtype if dtype.is_floating_point else torch.float32,
        n_queries=_LENGTH,
        n_keys=_LENGTH,
        head_size=size,
        value_size=size,
        mask=Intervals if padded else Band,
        band=None if padded else Band(right=0 if causal else None),
        one_row=not causal,
        needs_grad=module.training,
        **terms,
    )
