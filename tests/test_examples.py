"""Every example runs, and shows what it says it shows."""

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = {"quickstart.py", "train_accelerate.py", "finetune_t5.py", "score_function.py"}
NOTEBOOKS = {"notebook.ipynb"}


def run(*command, folder, **variables) -> tuple[str, str]:
    """What Python prints on stdout and on stderr."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **variables}
    result = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout, result.stderr


def losses(printed: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"step +\d+ +loss ([\d.]+)", printed)]


def test_every_example_is_run_here():
    files = {file.name for file in EXAMPLES.iterdir() if file.is_file()}
    assert files == SCRIPTS | NOTEBOOKS


def test_quickstart_shows_the_report_and_that_the_logits_agree(tmp_path):
    out, _ = run(EXAMPLES / "quickstart.py", folder=tmp_path)
    assert "flashpatch serves 4 of 4 attention modules" in out
    assert float(re.search(r"real tokens' logits: (\S+)", out)[1]) < 1e-5
    assert "bit-identical after revert: yes" in out


def test_a_launched_script_trains_on_two_processes_as_without_flashpatch(tmp_path):
    """accelerate and flashpatch.run against torchrun alone: the same script, the same losses."""
    script = EXAMPLES / "train_accelerate.py"
    short = ["--steps", 20, "--length", 128, "--batch", 2]
    patched, said = run(
        *("-m", "accelerate.commands.accelerate_cli", "launch"),
        *("--multi_gpu", "--num_processes", 2, "--num_machines", 1, "--main_process_port", 0),
        *("--mixed_precision", "no", "--dynamo_backend", "no"),
        *("-m", "flashpatch.run", script, *short),
        folder=tmp_path,
        ACCELERATE_USE_CPU="true",
    )
    plain, _ = run(
        *("-m", "torch.distributed.run", "--nproc-per-node", 2, "--standalone", script, *short),
        folder=tmp_path,
        ACCELERATE_USE_CPU="true",
    )
    assert patched.startswith("training on 2 processes")
    assert said.count("GPT2LMHeadModel on cpu: flashpatch serves 2 of 2 attention modules") == 1
    assert losses(patched) == pytest.approx(losses(plain), abs=2e-4)
    assert losses(patched)[-1] < losses(patched)[0] - 1


def test_t5_learns_and_shows_equal_gradients_in_less_memory(tmp_path):
    arguments = ["--steps", 20, "--batch", 4, "--document", 1024]
    out, _ = run(EXAMPLES / "finetune_t5.py", *arguments, folder=tmp_path)
    assert "flashpatch serves 6 of 6 attention modules" in out
    rows = re.findall(r"(all|encoder|nothing) +(\S+) MB +(\S+)\n", out)
    names, peaks, errors = zip(*rows, strict=True)
    assert names == ("all", "encoder", "nothing")
    assert max(map(float, errors)) < 1e-4
    if sys.platform == "linux":
        whole, encoder, nothing = map(float, peaks)
        assert whole < encoder < nothing
    assert losses(out)[-1] < losses(out)[0] - 1


def test_a_score_function_equals_its_matrix_and_is_trained_through(tmp_path):
    pytest.importorskip("triton", reason="Triton is not installed")
    out, _ = run(EXAMPLES / "score_function.py", folder=tmp_path, TRITON_INTERPRET="1")
    rows = re.findall(r"largest difference of (\w+) +(\S+)", out)
    assert [name for name, _ in rows] == ["output", "dq", "dk", "dv"]
    assert max(float(difference) for _, difference in rows) < 1e-5
    assert losses(out)[-1] < 0.7 * losses(out)[0]


def test_the_notebook_gives_the_outputs_it_was_saved_with(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    saved = nbformat.read(EXAMPLES / "notebook.ipynb", as_version=4)
    executed = NotebookClient(saved.copy(), timeout=300, kernel_name="python3").execute()

    def shown(notebook):
        return [
            output.get("text") or output["data"]["text/plain"]
            for cell in notebook.cells
            for output in cell.get("outputs", [])
        ]

    assert shown(executed) == shown(nbformat.read(EXAMPLES / "notebook.ipynb", as_version=4))
    assert any("text/html" in o.get("data", {}) for c in saved.cells for o in c.get("outputs", []))
