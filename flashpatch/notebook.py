"""`%load_ext flashpatch`: every transformers model of a notebook, patched.

Those that the notebook holds already, so that the order of the cells does not matter, and those
that it builds later. `%unload_ext flashpatch` undoes it all; `%flashpatch status` shows what is
patched.
"""

import html
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flashpatch import enabling

if TYPE_CHECKING:
    from torch import nn

    from flashpatch.report import Report


@dataclass(frozen=True)
class Note:
    """What a cell shows: HTML in a notebook, text in a terminal."""

    title: str
    report: "Report | None" = None

    def __repr__(self) -> str:
        return self.title if self.report is None else f"{self.title}: {self.report}"

    def _repr_html_(self) -> str:
        table = "" if self.report is None else self.report._repr_html_()
        return f"<p>{html.escape(self.title)}</p>{table}"


def load_ipython_extension(ipython: Any) -> None:
    """What `%load_ext flashpatch` calls.

    Args:
        ipython: The running `InteractiveShell`.
    """
    reports = enabling.enable(_modules(ipython.user_ns), on_apply=_show)
    ipython.register_magic_function(_magic, "line", "flashpatch")
    if not reports:
        _display(Note("flashpatch is on: transformers models built from now on are patched"))


def unload_ipython_extension(ipython: Any) -> None:
    """What `%unload_ext flashpatch` calls.

    Args:
        ipython: The running `InteractiveShell`.
    """
    enabling.disable()
    ipython.magics_manager.magics["line"].pop("flashpatch", None)


def _magic(line: str) -> None:
    """%flashpatch status: shows the models that are patched."""
    from IPython.core.error import UsageError

    if line.strip() not in ("", "status"):
        raise UsageError(f"%flashpatch knows `status` only, not {line.strip()!r}")
    reports = enabling.reports()
    for model, report in reports:
        _show(model, report)
    if not reports:
        _display(Note("flashpatch has patched no model yet"))


def _show(model: "nn.Module", report: "Report") -> None:
    _display(Note(enabling.title(model), report))


def _display(note: Note) -> None:
    from IPython.display import display

    display(note)


def _modules(namespace: Mapping[str, Any]) -> "list[nn.Module]":
    """The modules among a notebook's variables; none can exist before torch is imported."""
    torch = sys.modules.get("torch")
    if torch is None:
        return []
    return [value for value in namespace.values() if isinstance(value, torch.nn.Module)]
