"""The benchmarks' scripts run; their numbers are made elsewhere, on a quiet machine."""

import json
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "models_cpu.py"


@pytest.fixture(scope="module")
def models_cpu():
    spec = spec_from_file_location("models_cpu", SCRIPT)
    module = module_from_spec(spec)
    sys.modules["models_cpu"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["models_cpu"]


def test_models_cpu_saves_its_rows_and_their_conditions(tmp_path):
    command = [sys.executable, str(SCRIPT), "--tiny", "--threads", "1", "--out", str(tmp_path)]
    shown = subprocess.run(
        [*command, "--only", "bert", "llama"], capture_output=True, text=True, check=False
    )
    assert shown.returncode == 0, shown.stderr
    record = json.loads((tmp_path / "models_cpu_bert_llama.json").read_text())
    assert record["threads"] == 1
    assert record["versions"]["torch"]
    cases = [row["case"] for row in record["rows"]]
    assert cases == [
        "bert forward, full",
        "bert train, full",
        "bert forward, padded",
        "bert train, padded",
        "bert train, padded, dropout 0.1",
        "llama forward, full",
        "llama train, full",
        "llama forward, padded",
        "llama train, padded",
    ]
    assert all(case in shown.stdout for case in cases)
    compared = [row for row in record["rows"] if "dropout" not in row["case"]]
    assert all(row["difference"] < record["bars"]["difference"] for row in compared)


def test_a_t5_step_is_measured_under_each_attention(models_cpu):
    size = models_cpu.TINY.t5
    steps = {
        attention: models_cpu.t5_step(size, 192, 0.0, attention, threads=1)
        for attention in ("eager", "sdpa", "flashpatch")
    }
    assert all(step["seconds"] > 0 for step in steps.values())
    eager = steps["eager"]["loss"]
    assert [step["loss"] for step in steps.values()] == pytest.approx([eager] * 3, rel=1e-5)


def test_a_missed_bar_is_marked(models_cpu):
    row = models_cpu.Row("llama forward, full", "flashpatch", 128, 0.5, ratio=1.2, met=False)
    assert models_cpu.shown(row).endswith("MISSED")
    assert "1.200" in models_cpu.shown(row)


def rows_in_small(name, tmp_path):
    """What a script that can run dry then writes."""
    command = [
        sys.executable,
        str(SCRIPT.with_name(name)),
        "--dry",
        "--out",
        tmp_path / "rows.json",
    ]
    shown = subprocess.run(command, capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    return json.loads((tmp_path / "rows.json").read_text())["rows"]


def test_every_case_of_the_terms_runs_in_small(tmp_path):
    rows = rows_in_small("terms_gpu.py", tmp_path)
    groups = {row["group"] for row in rows}
    assert {"t5", "padded", "terms, d 64, full", "terms, d 128, causal"} <= groups
    assert not any("error" in row for row in rows)


def test_every_call_that_the_host_is_timed_for_runs_in_small(tmp_path):
    rows = rows_in_small("host_gpu.py", tmp_path)
    assert rows == [{"implementation": "flashpatch, its engine"}, {"implementation": "flashpatch"}]
