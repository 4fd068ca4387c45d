"""%load_ext flashpatch and back, in a real IPython shell."""

import sys

import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from torch import nn
from traitlets.config import Config
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

import flashpatch
from flashpatch.patching import patched_modules


def llama() -> LlamaModel:
    return LlamaModel(
        LlamaConfig(
            vocab_size=61,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
        )
    )


def bert() -> BertModel:
    return BertModel(
        BertConfig(
            vocab_size=61,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
        )
    )


class Shell:
    """An IPython shell that remembers what it displayed."""

    def __init__(self, folder):
        config = Config(HistoryManager={"enabled": False}, InteractiveShell={"colors": "NoColor"})
        self.ipython = InteractiveShell.instance(ipython_dir=str(folder), config=config)
        self.names = self.ipython.user_ns
        self.names.update(llama=llama, bert=bert)
        self.displayed = []
        self.printed = ""

    def run(self, cell: str) -> None:
        with capture_output() as captured:
            self.ipython.run_cell(cell, store_history=True).raise_error()
        self.displayed = [output.data for output in captured.outputs]
        self.printed = captured.stdout


@pytest.fixture
def shell(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])  # the shell takes it
    yield Shell(tmp_path)
    flashpatch.disable()
    InteractiveShell.clear_instance()


def test_models_built_before_and_after_loading_are_patched(shell):
    shell.run("early = llama()")
    shell.run("%load_ext flashpatch")
    shell.run("late = bert()")
    assert len(patched_modules(shell.names["early"])) == 2
    assert len(patched_modules(shell.names["late"])) == 1


def test_each_model_is_shown_once_as_html_and_as_text(shell):
    shell.run("model = llama(); again = model; part = model.layers[0]; wrapped = [model]")
    shell.run("model")  # now in the history too, as _ and Out
    shell.run("%load_ext flashpatch")
    (data,) = shell.displayed
    assert "LlamaModel" in data["text/html"]
    assert "<table>" in data["text/html"]
    assert data["text/plain"].startswith("LlamaModel on cpu: flashpatch serves 2 of 2")
    shell.run("other = bert()")
    (data,) = shell.displayed
    assert data["text/plain"].startswith("BertModel on cpu: flashpatch serves 1 of 1")


def test_models_inside_modules_are_found(shell):
    inside = llama()
    shell.names["pipeline"] = nn.Sequential(inside, nn.Linear(32, 2))
    shell.run("%load_ext flashpatch")
    assert len(patched_modules(inside)) == 2
    assert len(shell.displayed) == 1


def test_without_models_it_says_that_it_is_on(shell):
    shell.run("%load_ext flashpatch")
    (data,) = shell.displayed
    assert data["text/plain"] == (
        "flashpatch is on: transformers models built from now on are patched"
    )
    assert data["text/html"] == f"<p>{data['text/plain']}</p>"


def test_running_the_cell_again_is_safe(shell):
    constructor = LlamaModel.__init__
    shell.run("%load_ext flashpatch\nmodel = llama()")
    shell.run("%load_ext flashpatch\nmodel = llama()")
    assert "already loaded" in shell.printed
    shell.run("%reload_ext flashpatch")
    assert len(shell.displayed) == 1
    assert len(patched_modules(shell.names["model"])) == 2
    shell.run("%unload_ext flashpatch")
    assert LlamaModel.__init__ is constructor


def test_unloading_restores_models_classes_and_magics(shell):
    constructor = LlamaModel.__init__
    magics = set(shell.ipython.magics_manager.magics["line"])
    ids = torch.randint(61, (1, 7))
    shell.run("early = llama().eval()")
    before = shell.names["early"](ids).last_hidden_state
    shell.run("%load_ext flashpatch")
    shell.run("late = llama()")
    shell.run("%unload_ext flashpatch")
    assert not patched_modules(shell.names["early"])
    assert not patched_modules(shell.names["late"])
    assert not patched_modules(llama())
    assert torch.equal(shell.names["early"](ids).last_hidden_state, before)
    assert LlamaModel.__init__ is constructor
    assert set(shell.ipython.magics_manager.magics["line"]) == magics


def test_a_model_patched_by_hand_is_left_to_its_owner(shell):
    shell.run("import flashpatch\nmodel = llama()\nreport = flashpatch.apply(model)")
    shell.run("%load_ext flashpatch")
    shell.run("%unload_ext flashpatch")
    assert len(patched_modules(shell.names["model"])) == 2


def test_the_magic_shows_what_is_patched(shell):
    shell.run("%load_ext flashpatch")
    shell.run("%flashpatch status")
    assert shell.displayed[0]["text/plain"] == "flashpatch has patched no model yet"
    shell.run("model = llama()")
    shell.run("%flashpatch")
    assert shell.displayed[0]["text/plain"].startswith(
        "LlamaModel on cpu: flashpatch serves 2 of 2"
    )
    with capture_output() as captured:
        shell.ipython.run_line_magic("flashpatch", "")
    assert len(captured.outputs) == 1


def test_the_magic_refuses_what_it_does_not_know(shell):
    shell.run("%load_ext flashpatch")
    with capture_output() as captured:
        result = shell.ipython.run_cell("%flashpatch on")
    assert "knows `status` only, not 'on'" in captured.stderr + str(result.error_in_exec)
