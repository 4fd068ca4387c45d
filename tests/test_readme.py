"""What the README says is what the code does: its blocks run, its tables are complete."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import flashpatch.patches  # noqa: F401  (fills the registry)
from flashpatch.registry import registered
from flashpatch_kernels.engines import COMMON, ENGINES

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text("utf-8")

# Gives every checkpoint the shape of its original's attention, with few and random weights.
OFFLINE = """
import warnings
from transformers import AutoConfig, AutoModelForSeq2SeqLM, T5Config
def tiny(name, **kwargs):
    assert name == "google/flan-t5-base"
    return AutoModelForSeq2SeqLM.from_config(T5Config(
        vocab_size=32, d_model=24, d_kv=64, d_ff=8, num_layers=12, num_heads=12,
        feed_forward_proj="gated-gelu",
    ))
AutoModelForSeq2SeqLM.from_pretrained = tiny
"""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


def table(heading: str) -> list[list[str]]:
    """The cells of the table under a heading, without its two header lines."""
    section = TEXT.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_python_blocks_run_and_print_what_is_shown():
    code = OFFLINE + "\n".join(blocks("python"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == blocks("text")[0]


def test_the_score_function_is_that_of_the_example():
    """It needs a GPU; `test_examples.py` runs it without one."""
    (code,) = blocks("py")
    assert code in (ROOT / "examples" / "score_function.py").read_text("utf-8")


def test_every_family_that_is_named_is_served():
    told = {n for row in table("Families") for n in re.findall(r"\b[a-z][a-z0-9_]+\b", row[1])}
    owned = [p.owner.split(".") for p in registered()]
    types = {o[2] for o in owned if o[:2] == ["transformers", "models"]}
    assert told - {"own"} <= types


def test_every_engine_is_listed_in_order():
    assert [row[0].strip("`") for row in table("Engines")] == [e.name for e in ENGINES]


def test_every_reason_is_listed():
    told = [row[0].strip("`") for row in table("Reasons")]
    assert sorted(told) == sorted({*reasons_of_flashpatch(), *(r.name for r, _ in COMMON)})


def reasons_of_flashpatch() -> set[str]:
    """The names of all reasons that `flashpatch`, not an engine, can give."""
    calls = [
        node
        for file in (ROOT / "flashpatch").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "Reason"
    ]
    return {ast.literal_eval(call.args[0]) for call in calls}


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_the_versions_told_are_those_asked_for(package):
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    (floor,) = re.findall(rf'^    "{package}>=([\d.]+)",$', project, re.MULTILINE)
    assert re.search(rf"\b{package} >= {re.escape(floor)}[ .,\n]", TEXT)


def command(name: str) -> str:
    """The command that stands under a marker, as `.ci/run` finds it too."""
    (found,) = re.findall(rf"<!-- command: {name} -->\n```\w*\n(.*?)\n```", TEXT, re.DOTALL)
    return found


def test_both_commands_install_the_tested_versions():
    install = "pip install -c constraints.txt -e "
    assert command("demo") == f"{install}'.[demo]' && flashpatch demo"
    assert command("test") == f"{install}'.[test]' && pytest"


@pytest.mark.skipif(shutil.which("bash") is None, reason="the script is for bash")
def test_continuous_integration_runs_the_test_command():
    shown = subprocess.run(
        ["bash", ROOT / ".ci" / "run", "--show"], capture_output=True, text=True, check=True
    )
    assert shown.stdout.strip() == command("test")


def test_nothing_is_left_to_fill_in():
    assert "<!-- fill" not in TEXT
