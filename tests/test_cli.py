"""The command line: what it prints, what it costs to start, how it says no."""

import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import pytest
from typer.testing import CliRunner

import flashpatch
from flashpatch import cli

RUNNER = CliRunner()


def test_help_does_not_wait_for_torch():
    code = (
        "import sys; from typer.testing import CliRunner; from flashpatch.cli import app;"
        "print(CliRunner().invoke(app, ['--help']).output);"
        "print('heavy:', sorted({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "demo" in shown.stdout
    assert "heavy: []" in shown.stdout


def test_version_is_that_of_the_package():
    assert RUNNER.invoke(cli.app, ["version"]).output == f"{flashpatch.__version__}\n"


def test_env_lists_versions_and_what_is_missing(monkeypatch):
    def version(name):
        if name == "triton":
            raise PackageNotFoundError(name)
        return "1.2.3"

    monkeypatch.setattr(cli, "version", version)
    lines = RUNNER.invoke(cli.app, ["env"]).output.splitlines()
    assert "torch         1.2.3" in lines
    assert "triton        not installed" in lines
    assert any(line.startswith("cpu ") for line in lines)


def test_demo_without_its_packages_says_how_to_install_them(monkeypatch):
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "matplotlib" else object())
    result = RUNNER.invoke(cli.app, ["demo"])
    assert result.exit_code == 1
    assert result.output == "The demo needs matplotlib: pip install 'flashpatch[demo]'\n"


@pytest.mark.parametrize("failures", [[], ["something differs"]])
def test_demo_exits_with_1_when_something_failed(monkeypatch, tmp_path, failures):
    from flashpatch.demo import run

    calls = []

    def pretend(out, device, *, quick, start):
        calls.append((out, device, quick))
        return failures

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(run, "run", pretend)
    arguments = ["demo", "--out", str(tmp_path), "--device", "cpu", "--quick"]
    assert RUNNER.invoke(cli.app, arguments).exit_code == len(failures)
    assert calls == [(tmp_path, "cpu", True)]


def test_demo_refuses_a_device_that_is_not_there(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    result = RUNNER.invoke(cli.app, ["demo", "--device", "abacus", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "no device 'abacus' here" in result.output


@pytest.fixture
def some_architectures(monkeypatch):
    """Three types instead of all: reading every class takes half a minute."""
    from flashpatch import architectures

    monkeypatch.setattr(
        architectures, "CONFIG_MAPPING", {n: architectures.CONFIG_MAPPING[n] for n in SOME}
    )


SOME = ("bert", "llama", "resnet")


def test_models_lists_the_types_that_match(some_architectures):
    shown = RUNNER.invoke(cli.app, ["models", "*a*"], env={"COLUMNS": "200"}).output
    assert "llama" in shown
    assert "interface" in shown
    assert "bert" not in shown


def test_models_as_a_document(some_architectures):
    shown = RUNNER.invoke(cli.app, ["models", "--markdown"]).output
    assert shown.startswith("# Architectures of transformers")
    assert "\n| llama | interface |" in shown


def test_models_refuses_a_pattern_that_matches_nothing(some_architectures):
    result = RUNNER.invoke(cli.app, ["models", "abacus"])
    assert result.exit_code == 2
    assert "'abacus'" in result.output
