"""The rules of the house, read from its files: who imports whom, what is public, what is absent."""

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib.metadata import requires, version
from pathlib import Path

import pytest

import flashpatch
import flashpatch_kernels

ROOT = Path(__file__).parent.parent
SOURCES = {"flashpatch": ROOT, "flashpatch_kernels": ROOT / "kernels"}

# The only packages that the kernels know besides themselves and the standard library.
KERNELS_KNOW = {"flashpatch_kernels", "jaxtyping", "torch", "triton"}

# The modules (with what is inside them) that may import transformers, and those that may do so
# inside a function only, because they are loaded before a script has imported it.
KNOW_TRANSFORMERS = (
    "flashpatch.patches",
    "flashpatch.masks",
    "flashpatch.demo",
    "flashpatch.architectures",
    "flashpatch.weights",
)
KNOW_TRANSFORMERS_LAZILY = ("flashpatch.enabling",)

# Modules that must load where Triton is not installed: all but these.
KNOW_TRITON = ("flashpatch_kernels.triton", "flashpatch_kernels.hopper")

# A module -> what it must not import, directly or not: the layers, from the bottom.
ABOVE = {
    "flashpatch.registry": ("flashpatch.", "flashpatch_kernels"),
    "flashpatch.dispatch": ("flashpatch.patches", "flashpatch.patching", "flashpatch.report"),
    "flashpatch.masks": ("flashpatch.patches", "flashpatch.patching", "flashpatch.dispatch"),
    "flashpatch.patches": ("flashpatch.patching", "flashpatch.enabling", "flashpatch.report"),
    "flashpatch.patching": ("flashpatch.enabling", "flashpatch.run", "flashpatch.notebook"),
}

VAGUE = {"base", "common", "compat", "helpers", "misc", "util", "utils"}

PUBLIC = {
    "flashpatch": {
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
    },
    "flashpatch_kernels": {
        "Band",
        "Boolean",
        "Intervals",
        "Mask",
        "Options",
        "Relative",
        "Score",
        "attention",
        "attention_varlen",
    },
}


def module_files() -> dict[str, Path]:
    """Module name -> file, of both packages."""
    files = {}
    for package, source in SOURCES.items():
        for file in sorted((source / package).rglob("*.py")):
            parts = file.relative_to(source).with_suffix("").parts
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return files


FILES = module_files()


def is_for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


@cache
def imports(module: str, *, inside_functions: bool) -> frozenset[str]:
    """What a module imports when it runs; for `from a import b`, `a.b` where that is a module."""

    def walk(node: ast.AST) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                for alias in child.names:
                    inner = f"{child.module}.{alias.name}"
                    yield inner if inner in FILES else child.module or ""
            elif is_for_type_checkers(child):
                yield from (name for part in child.orelse for name in walk(part))
            elif inside_functions or not isinstance(child, ast.FunctionDef | ast.Lambda):
                yield from walk(child)

    return frozenset(walk(ast.parse(FILES[module].read_text("utf-8"))))


def within(module: str, rooms: tuple[str, ...]) -> bool:
    return any(f"{module}.".startswith(f"{room.removesuffix('.')}.") for room in rooms)


def reached(module: str) -> set[str]:
    """Every module of ours that importing this one loads, besides the packages around it."""
    seen, ahead = set(), [module]
    while ahead:
        new = {n for n in imports(ahead.pop(), inside_functions=False) if n in FILES} - seen
        seen |= new
        ahead.extend(new)
    return seen


@pytest.mark.parametrize("module", [m for m in FILES if within(m, ("flashpatch_kernels",))])
def test_kernels_know_torch_and_triton_only(module):
    known = KERNELS_KNOW | sys.stdlib_module_names
    strangers = {n for n in imports(module, inside_functions=True) if n.split(".")[0] not in known}
    assert not strangers


@pytest.mark.parametrize("module", FILES)
def test_only_the_rooms_named_for_it_import_transformers(module):
    may = within(module, KNOW_TRANSFORMERS)
    may_lazily = may or within(module, KNOW_TRANSFORMERS_LAZILY)
    for lazily, allowed in ((False, may), (True, may_lazily)):
        names = imports(module, inside_functions=lazily)
        assert allowed or not any(within(n, ("transformers",)) for n in names)


@pytest.mark.parametrize("module", [m for m in FILES if not within(m, KNOW_TRITON)])
def test_triton_is_imported_by_its_own_engines_only(module):
    loaded = imports(module, inside_functions=False)
    assert not any(within(n, ("triton", *KNOW_TRITON)) for n in loaded)


@pytest.mark.parametrize("room", ABOVE)
def test_lower_layers_do_not_import_upper_ones(room):
    for module in (m for m in FILES if within(m, (room,))):
        wrong = {n for n in reached(module) if within(n, ABOVE[room]) and not within(n, (room,))}
        assert not wrong, module


def test_imports_have_no_cycles():
    graph = {m: {n for n in imports(m, inside_functions=False) if n in FILES} - {m} for m in FILES}
    while leaves := {m for m in graph if not graph[m]}:
        graph = {m: graph[m] - leaves for m in graph if m not in leaves}
    assert not graph


def test_the_source_root_of_the_kernels_is_no_package():
    """`kernels/__init__.py` would shadow Hugging Face's `kernels`, which transformers imports."""
    assert [p.name for p in (ROOT / "kernels").iterdir() if p.name != "__pycache__"] == [
        "flashpatch_kernels"
    ]


def test_no_file_has_a_name_that_says_nothing():
    assert not [f for f in FILES.values() if f.stem.strip("_") in VAGUE]


@pytest.mark.parametrize("package", [flashpatch, flashpatch_kernels], ids=lambda p: p.__name__)
def test_the_public_names_are_exactly_these(package):
    assert list(package.__all__) == sorted(PUBLIC[package.__name__])
    assert all(getattr(package, name) is not None for name in package.__all__)
    assert set(package.__all__) <= set(dir(package))


def test_no_public_name_is_also_a_module():
    """`flashpatch.apply` cannot be both; which one it was would depend on what was imported."""
    assert not [m for m in FILES if m.rpartition(".")[2] in PUBLIC.get(m.rpartition(".")[0], ())]


def test_names_load_from_where_type_checkers_find_them():
    """The lazy table and the `TYPE_CHECKING` block of `flashpatch` say the same."""
    tree = ast.parse(FILES["flashpatch"].read_text("utf-8"))
    (block,) = (node for node in tree.body if is_for_type_checkers(node))
    typed = {
        alias.name: node.module
        for node in ast.walk(block)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed == flashpatch._HOMES
    for name, home in typed.items():
        assert getattr(importlib.import_module(home), name) is getattr(flashpatch, name)


def test_the_version_is_one():
    assert flashpatch.__version__ == version("flashpatch")
    assert f"## {flashpatch.__version__}" in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_every_requirement_has_its_tested_version():
    text = (ROOT / "constraints.txt").read_text("utf-8")
    pinned = re.findall(r"^([a-z0-9-]+)==[^;*\n]+(?:;.*)?$", text, re.MULTILINE)
    wanted = {re.split(r"[^\w.-]", r, maxsplit=1)[0].lower() for r in requires("flashpatch") or ()}
    assert wanted - {"flashpatch"} <= set(pinned)


def project_texts() -> Iterator[tuple[Path, str]]:
    """The text files of the checkout; what git ignores is left out where git is there to ask."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, done.stdout.split("\0")):
        data = (ROOT / name).read_bytes() if (ROOT / name).exists() else b""
        if b"\0" not in data:
            yield ROOT / name, data.decode("utf-8")


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="only a checkout can be listed")
@pytest.mark.parametrize(
    "pattern",
    [
        r"/(work|root|tmp)/[a-z]",
        r"/(home|Users)/[a-z]+/",
        r"pypi[.]org|files[.]pythonhosted|download[.]pytorch|--(extra-)?index-url|--find-[l]inks",
    ],
    ids=["a directory of one machine", "somebody's home", "a package registry"],
)
def test_no_file_names(pattern):
    hits = [
        f"{file.relative_to(ROOT)}: {line.strip()[:100]}"
        for file, text in project_texts()
        for line in text.splitlines()
        if re.search(pattern, line)
    ]
    assert not hits
