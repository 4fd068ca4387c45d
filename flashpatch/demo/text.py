"""Real text that every machine has: the sources of Python's standard library."""

import ast
import random
import re
import sysconfig
from pathlib import Path

PROSE = (
    *("argparse", "bisect", "calendar", "difflib", "doctest", "fractions", "heapq", "inspect"),
    *("pathlib", "pickle", "random", "shutil", "statistics", "string", "tempfile", "textwrap"),
)
"""Modules whose docstrings explain at length."""


def _sources() -> list[Path]:
    """The library's top-level modules, by name."""
    return sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))


def passages(count: int) -> list[str]:
    """Sentences and whole docstrings, evenly spaced from the shortest to the longest, shuffled."""
    found = set()
    for path in _sources():
        if path.stem not in PROSE:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                continue
            docstring = ast.get_docstring(node) or ""
            if ">>>" in docstring:
                continue
            for paragraph in docstring.split("\n\n"):
                flat = " ".join(paragraph.split())
                found.update([flat, *re.split(r"(?<=[.!?])\s+(?=[A-Z])", flat)])
            found.add(" ".join(docstring.split()))
    sentences = (text for text in found if re.fullmatch(r"[A-Z][a-z]+ .+ .+[.!?]", text))
    ordered = sorted(sentences, key=lambda text: (len(text), text))
    if len(ordered) < count:
        raise RuntimeError(
            f"{len(ordered)} passages found in {sysconfig.get_path('stdlib')}, {count} needed: "
            "this Python was installed without the sources of its standard library"
        )
    # even steps in length, not in rank: most sentences are short
    chosen: list[str] = []
    for step in range(count):
        low = len(ordered[0]) * (1500 / len(ordered[0])) ** (step / (count - 1))
        later = (text for text in ordered if len(text) >= low and text not in chosen)
        chosen.append(next(later, ordered[-1]))
    random.Random(0).shuffle(chosen)
    return chosen


def stream(length: int) -> bytes:
    """The first `length` bytes of the library's sources, one module after the other."""
    text = b""
    for path in _sources():
        text += path.read_bytes()
        if len(text) >= length:
            return text[:length]
    raise RuntimeError(f"only {len(text)} bytes of sources in {sysconfig.get_path('stdlib')}")
