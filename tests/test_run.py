"""python -m flashpatch.run: to the script all is as without it, but its models are patched."""

import os
import re
import signal
import subprocess
import sys
import zipfile
from dataclasses import dataclass

import pytest
import torch
from transformers import LlamaModel

from flashpatch import run
from flashpatch.patching import patched_modules
from flashpatch.report import Report
from flashpatch.run import USAGE, ignore

NOTHING = "flashpatch patched nothing: the script built no transformers model\n"


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


def python(*arguments, folder, timeout=120, **variables) -> Outcome:
    result = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    return Outcome(result.returncode, result.stdout, result.stderr)


def both(*arguments, folder, options=(), **variables) -> tuple[Outcome, Outcome]:
    """The same program without the launcher and with it."""
    plain = python(*options, *arguments, folder=folder, **variables)
    launched = python(*options, "-m", "flashpatch.run", *arguments, folder=folder, **variables)
    return plain, launched


def assert_alike(plain: Outcome, launched: Outcome, said: str = "") -> None:
    assert launched == Outcome(plain.code, plain.out, plain.err + said)


@pytest.fixture
def folder(tmp_path):
    """A project of some files, launched from the folder above it."""
    project = tmp_path / "project"
    project.mkdir()
    (project / "sibling.py").write_text("VALUE = 'from the sibling'\n")
    (project / "inside").mkdir()
    (project / "inside" / "__init__.py").write_text("")
    (project / "inside" / "part.py").write_text("from project.inside import __name__ as package\n")
    return tmp_path


def write(folder, text, name="train.py") -> str:
    (folder / "project" / name).write_text(text)
    return f"project/{name}"


ENVIRONMENT = '''"""The script's documentation."""
import sys
import sibling

print(sys.argv, sibling.VALUE)
print(sys.path)
print({name: value for name, value in sorted(globals().items())
       if name not in ("__builtins__", "__loader__", "__spec__")})
print(type(__builtins__), type(__loader__), __loader__.get_filename(), __spec__)
print(sys.modules["__main__"].__dict__ is globals(), __name__, sys.flags)
print("torch" in sys.modules, "transformers" in sys.modules, "numpy" in sys.modules)
'''


@pytest.mark.parametrize(
    "arguments",
    [
        ["project/train.py"],
        ["project/train.py", "--lr", "1e-4", "-m", "--help", ""],
        ["./project/../project/train.py", "x"],
        ["link.py"],
    ],
    ids=["plain", "arguments", "path not normalised", "link"],
)
def test_a_script_finds_everything_as_without_the_launcher(folder, arguments):
    write(folder, ENVIRONMENT)
    (folder / "link.py").symlink_to(folder / "project" / "train.py")
    assert_alike(*both(*arguments, folder=folder), said=NOTHING)


def test_a_script_given_by_its_absolute_path_runs(folder):
    write(folder, ENVIRONMENT)
    assert_alike(*both(folder / "project" / "train.py", folder="/"), said=NOTHING)


@pytest.mark.parametrize("option", ["-P", "-I"])
@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 has no -P")
def test_a_safe_path_stays_safe(folder, option, tmp_path):
    write(folder, "import sys\nprint(sys.path)\n")
    plain, launched = both("project/train.py", folder=folder, options=[option])
    assert_alike(plain, launched, said=NOTHING)


def test_a_module_runs_as_with_python_m(folder):
    write(
        folder, "import sys\nprint(sys.argv, __name__, __spec__.name, __package__, sys.path[0])\n"
    )
    plain, launched = both("-m", "project.train", "--epochs", "3", folder=folder)
    assert "project.train" in plain.out
    assert_alike(plain, launched, said=NOTHING)


def test_a_package_a_folder_and_an_archive_run_by_their_main(folder):
    write(folder, "import sys\nprint(sys.argv, __name__, sys.path[0])\n", "__main__.py")
    with zipfile.ZipFile(folder / "archive.zip", "w") as archive:
        archive.write(folder / "project" / "__main__.py", "__main__.py")
    for arguments in (["-m", "project", "a"], ["project", "a"], ["archive.zip", "a"]):
        plain, launched = both(*arguments, folder=folder)
        assert plain.code == 0
        assert_alike(plain, launched, said=NOTHING)


FAILURES = {
    "chained": "def f():\n    try:\n        1 / 0\n    except ZeroDivisionError as error:\n"
    "        raise RuntimeError('no') from error\nf()\n",
    "in a library": "import json\njson.loads('{')\n",
    "on import": "import sibling, nowhere\n",
    "syntax": "def (\n",
    "own hook": "import sys\nsys.excepthook = lambda kind, error, trace: "
    "print(kind, error, trace.tb_frame.f_code.co_name, trace.tb_next)\nraise KeyError('x')\n",
    "exit": "import sys\nsys.exit(7)\n",
    "exit with words": "raise SystemExit('out of data')\n",
    "at exit": "import atexit\natexit.register(print, 'bye')\nraise ValueError(1)\n",
}


@pytest.mark.parametrize("script", FAILURES.values(), ids=FAILURES)
def test_a_script_fails_as_without_the_launcher(folder, script):
    plain, launched = both(write(folder, script), folder=folder)
    assert plain.code != 0
    assert_alike(plain, launched)


@pytest.mark.skipif(os.name == "nt", reason="signals are sent otherwise on Windows")
def test_an_interrupted_script_dies_of_the_interrupt(folder):
    # Whoever runs these tests in the background has had them ignore interrupts.
    heeds = "signal.signal(signal.SIGINT, signal.default_int_handler)"
    sends = "os.kill(os.getpid(), signal.SIGINT)"
    script = f"import os, signal, time\n{heeds}\n{sends}\ntime.sleep(9)\n"
    plain, launched = both(write(folder, script), folder=folder)
    assert plain.code == -signal.SIGINT
    assert_alike(plain, launched)


def test_a_module_fails_as_with_python_m(folder):
    write(folder, "raise ValueError('no')\n")
    for arguments in (["-m", "project.train"], ["-m", "project.nowhere"], ["-m", "nowhere"]):
        plain, launched = both(*arguments, folder=folder)
        assert plain.code == 1
        assert_alike(plain, launched)


def test_a_script_that_is_not_there_fails_as_without_the_launcher(folder):
    plain, launched = both("project/nowhere.py", folder=folder)
    assert plain.code == 2
    assert_alike(plain, launched)


def test_classes_of_the_script_can_be_pickled_and_processes_spawned(folder):
    script = """
import multiprocessing
import pickle

class Settings:
    pass

def square(x):
    return x * x

if __name__ == "__main__":
    assert type(pickle.loads(pickle.dumps(Settings()))) is Settings
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.map(square, [1, 2, 3]))
"""
    plain, launched = both(write(folder, script), folder=folder)
    assert plain.out == "[1, 4, 9]\n"
    assert_alike(plain, launched, said=NOTHING)


MODEL = """
import os, sys, torch
os.environ["HF_HOME"] = "somewhere"
from huggingface_hub import constants
from transformers import LlamaConfig, LlamaModel

class Mine(LlamaModel):
    def __init__(self, config, fail):
        super().__init__(config)
        if fail:
            raise RuntimeError("no such luck")

config = LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=2,
                     num_attention_heads=2)
model = Mine(config, fail=False)
print(constants.HF_HOME, torch.cuda.is_initialized())
torch.save(model, "model.pt")
if "fail" in sys.argv:
    try:
        Mine(config, fail=True)
    except RuntimeError as error:
        raise KeyError("give up") from error
"""
REPORT = r"""Mine on cpu: flashpatch serves 2 of 2 attention modules
  layers\.\*\.self_attn  LlamaAttention  x2  runs on .*
"""


def test_models_are_patched_and_reported_and_tracebacks_show_no_frame_of_ours(folder):
    script = write(folder, MODEL)
    plain, launched = both(script, "fail", folder=folder, RANK="0")
    assert "no such luck" in plain.err
    report = re.match(REPORT, launched.err)
    assert report
    assert_alike(Outcome(plain.code, plain.out, report[0] + plain.err), launched)
    assert plain.out == "somewhere False\n"


def test_other_ranks_are_silent_and_their_models_can_be_saved(folder, monkeypatch):
    script = write(folder, MODEL)
    result = python("-m", "flashpatch.run", script, folder=folder, RANK="3", LOCAL_RANK="0")
    assert result == Outcome(0, "somewhere False\n", "")
    monkeypatch.setattr(sys.modules["__main__"], "Mine", type("Mine", (LlamaModel,), {}), False)
    model = torch.load(folder / "model.pt", weights_only=False)
    assert len(patched_modules(model)) == 2
    assert vars(model.layers[0].self_attn)["_flashpatch"].on_fallback is ignore


def test_models_without_known_attention_are_reported_at_exit(caplog):
    caplog.set_level("INFO", logger="flashpatch.run")
    narrator = run._Narrator()
    narrator.tell(torch.nn.Identity(), Report(()))
    narrator.sum_up()
    assert caplog.messages == [
        "Identity: flashpatch: no attention modules found",
        "flashpatch patched nothing: none of the models has attention it can serve",
    ]
    narrator.served = 1
    narrator.sum_up()
    assert len(caplog.messages) == 2


def test_without_a_script_it_says_in_a_sentence_what_it_needs(tmp_path):
    for arguments, expected in (
        ([], Outcome(2, "", USAGE + "\n")),
        (["-m"], Outcome(2, "", USAGE + "\n")),
        (["--only", "x"], Outcome(2, "", USAGE + "\n")),
        (["--help"], Outcome(0, USAGE + "\n", "")),
    ):
        assert python("-m", "flashpatch.run", *arguments, folder=tmp_path) == expected
    assert "\n" not in USAGE
