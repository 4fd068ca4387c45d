"""Tiny models of all types, and what is compared of them."""

import importlib
import inspect
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from operator import attrgetter
from types import ModuleType
from typing import Any

import pytest
import torch
from matrix.configs import tiny_config
from matrix.inputs import BATCH, inputs_by_name, token_mask
from matrix.row import Row
from matrix.table import ROWS
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from flashpatch import dispatch
from flashpatch.architectures import attention_classes, model_classes
from flashpatch_kernels.engines import Engine

# Where a model class is looked for; those that generate come first.
GENERATIVE = (
    "MODEL_FOR_CAUSAL_LM_MAPPING",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING",
)
MAPPINGS = (
    *GENERATIVE,
    "MODEL_MAPPING",
    "MODEL_FOR_PRETRAINING_MAPPING",
    "MODEL_FOR_TEXT_TO_WAVEFORM_MAPPING",
    "MODEL_FOR_TEXT_TO_SPECTROGRAM_MAPPING",
    "MODEL_FOR_OBJECT_DETECTION_MAPPING",
    "MODEL_FOR_CTC_MAPPING",
    "MODEL_FOR_KEYPOINT_MATCHING_MAPPING",
)


def model_class(config: Any) -> type[PreTrainedModel]:
    """The class that transformers itself maps the config to, or else the largest of its module."""
    names = MAPPINGS
    if getattr(config, "is_encoder_decoder", False):
        names = (MAPPINGS[1], *MAPPINGS)
    for name in names:
        mapping = getattr(modeling_auto, name, {})
        found = mapping.get(type(config), None)
        if found is not None:
            return found[0] if isinstance(found, tuple) else found
    classes = [c for c in model_classes(type(config)) if not c.__name__.endswith("PreTrainedModel")]
    if not classes:
        raise LookupError(f"{type(config).__name__} has no model class")
    return min(classes, key=lambda c: (not c.__name__.endswith("Model"), len(c.__name__)))


def without_dropout(model: Any) -> None:
    """What a config does not switch off."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def row_or_skip(model_type: str) -> Row:
    """The row of a model type, if there is something to test, and transformers can build it."""
    if not attention_classes(model_type):  # which ARCHITECTURES.md lists, compared by its own test
        pytest.skip("no attention")
    row = ROWS.get(model_type, Row())
    if row.needs:
        pytest.importorskip(row.needs)
    if row.broken:  # it must be: the row fails as soon as transformers can build the model
        with pytest.raises(ValueError, match=row.broken):
            build(model_type, row)
        pytest.skip(row.broken)
    return row


def modeling(config: Any) -> ModuleType:
    """The file of models beside a config's own."""
    name = type(config).__module__.replace(".configuration_", ".modeling_")
    return importlib.import_module(name)


def build(model_type: str, row: Row, seed: int = 0) -> Any:
    """A tiny model whose attention matters: weights large enough that its scores differ."""
    torch.manual_seed(seed)
    config = tiny_config(model_type, row.config)
    cls: Any = model_class(config) if row.model is None else getattr(modeling(config), row.model)
    model = cls._from_config(config, attn_implementation=row.reference)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point() or not parameter.numel():
                continue
            if parameter.ndim > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
            else:
                parameter += torch.randn_like(parameter) / 10
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                module.weight.normal_()
    return set_training(model.float(), training=row.training)


def set_training(model: Any, *, training: bool) -> Any:
    """Sets the mode of all but recurrent layers, which cuDNN differentiates in training only."""
    model.train(training)
    for module in model.modules():
        if isinstance(module, nn.RNNBase):
            module.train()
            module.dropout = 0.0
    return model


@dataclass(frozen=True)
class Call:
    """One method of a model, or `part.method` of a part of it, and its arguments."""

    method: str
    arguments: dict[str, Any]

    def run(self, model: Any) -> Any:
        torch.manual_seed(1)  # for those that draw noise
        part, _, name = self.method.rpartition(".")
        called = attrgetter(part)(model) if part else model
        if name != "forward":  # which is called as users do, with its hooks
            called = getattr(called, name)
        return called(**self.arguments)


# Methods that run a part of the model which `forward` may not reach without images or sound.
TOWERS = ("get_image_features", "get_audio_features")


def calls_of(model: Any, row: Row) -> list[Call]:
    """What the row calls: `forward`, and each tower that has a method of its own."""
    calls = []
    forwards = type(model).forward is not nn.Module.forward  # some are only made of parts
    if forwards and row.calls.get("forward", True) is not None:
        arguments = inputs_by_name(model) if row.inputs is None else row.inputs(model)
        more = {} if row.more is None else row.more(model)
        calls.append(Call("forward", {**arguments, **more}))
    towers = TOWERS if calls else ()
    for method in dict.fromkeys((*towers, *row.calls)):
        if method in row.calls:
            make = row.calls[method]
            if make is not None:
                calls.append(Call(method, make(model)))
        elif hasattr(model, method):
            calls.append(Call(method, inputs_by_name(model, method)))
    return calls


def all_calls(model: Any, row: Row) -> list[Call]:
    """What the row calls, and its first call with padding."""
    calls = calls_of(model, row)
    paddings = (padded(model, calls[0], padding) for padding in row.paddings)
    return calls + [call for call in paddings if call is not None]


def padded(model: Any, call: Call, padding: str) -> Call | None:
    """The same call with padding, if the model takes tokens and a mask of them."""
    parameters = inspect.signature(type(model).forward).parameters
    ids = call.arguments.get("input_ids")
    if call.method != "forward" or ids is None or ids.ndim != 2 or ids.shape[0] != BATCH:
        return None
    if "attention_mask" not in parameters or "attention_mask" in call.arguments:
        return None
    mask = token_mask(padding, ids.shape[1])
    return Call("forward", {**call.arguments, "attention_mask": mask})


def tensors_of(
    output: Any, path: str = "", *, weights: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of floating point numbers within a model's output, by their places.

    Attention weights, which some models return unasked, are none where engines compute, and are
    left out but for `weights`.
    """
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield path, output
    elif isinstance(output, Mapping):
        for name, value in output.items():
            # what a model remembers of earlier texts is no result of this call
            if (weights or "attentions" not in name) and name != "rope_deltas":
                yield from tensors_of(value, f"{path}.{name}", weights=weights)
    elif isinstance(output, tuple | list):
        for index, value in enumerate(output):
            yield from tensors_of(value, f"{path}[{index}]", weights=weights)


@dataclass(frozen=True)
class Step:
    """What a call gives: its outputs, and the gradients of a random projection of them."""

    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor]


def of_tokens(outputs: dict[str, Tensor], real: Tensor) -> dict[str, Tensor]:
    """What of the outputs belongs to tokens that are no padding.

    Of sound and images, whose masks are finer than the tokens, one in several entries tells; where
    none does, all outputs are taken.
    """
    batch, length = real.shape
    for coarse in (False, True):
        found = {}
        for name, x in outputs.items():
            if x.ndim < 2 or x.shape[0] != batch or not 0 < x.shape[1] <= length:
                continue
            factor, rest = divmod(length, x.shape[1])
            if rest == 0 and (coarse or factor == 1):
                found[name] = x[real[:, ::factor]]
        if found:
            return found
    return outputs


def step(model: Any, call: Call) -> Step:
    """One forward and backward pass; of padded tokens nothing is looked at."""
    model.zero_grad()
    # what a model keeps while it is not trained would hold the graph of the step before
    training = model.training
    model.train()
    set_training(model, training=training)
    outputs = dict(tensors_of(call.run(model)))
    mask = call.arguments.get("attention_mask")
    if mask is not None and mask.ndim == 2:
        outputs = of_tokens(outputs, mask.bool())
    outputs = {name: x for name, x in outputs.items() if x.numel()}
    assert outputs, "the model gives no output that can be compared"
    generator = torch.Generator().manual_seed(2)
    total = torch.zeros(())
    for x in outputs.values():
        if x.requires_grad:
            weights = torch.randn(x.shape, generator=generator, dtype=torch.float32).to(x)
            total = total + (x.nan_to_num(0.0, 0.0, 0.0) * weights).sum() / x.numel() ** 0.5
    if total.requires_grad:
        total.backward()
    return Step(
        {name: x.detach().clone() for name, x in outputs.items()},
        {
            n: p.grad.clone()
            for n, p in model.named_parameters()
            if p.grad is not None and p.numel()
        },
    )


@dataclass
class Served:
    """How many calls engines computed: of each attention class, and each engine."""

    classes: Counter[str] = field(default_factory=Counter)
    engines: Counter[str] = field(default_factory=Counter)


@contextmanager
def counted(model: Any, engine: Engine | None = None) -> Iterator[Served]:
    """Every call that an engine serves is counted, and goes to the engine that is given, if any."""
    served, within = Served(), []
    run = dispatch.run
    handles = []

    def enter(module: nn.Module, _: Any) -> None:
        within.append(module)

    def leave(*_: Any) -> None:
        within.pop()

    for module in model.modules():
        if "_flashpatch" in vars(module):
            handles += [
                module.register_forward_pre_hook(enter),
                module.register_forward_hook(leave, always_call=True),
            ]

    def counting(q: Any, k: Any, v: Any, options: Any, name: str) -> Any:
        served.classes[type(within[-1]).__name__ if within else "?"] += 1
        served.engines[name] += 1
        return run(q, k, v, options, name)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(dispatch, "run", counting)
        if engine is not None:
            patched.setattr(dispatch, "choose", lambda call: engine)
        try:
            yield served
        finally:
            for handle in handles:
                handle.remove()


def distance(a: Tensor, b: Tensor, least: float) -> float:
    """The largest difference, relative to the largest value, taken to be no less than `least`."""
    assert a.shape == b.shape
    finite = b.isfinite()
    assert torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num())
    if not finite.any():
        return 0.0
    size = float(b[finite].abs().max())
    return float((a - b)[finite].abs().max()) / max(size, least)


def largest_distances(ours: Step, theirs: Step) -> tuple[float, float]:
    """Of the outputs, and of the gradients."""
    assert ours.outputs.keys() == theirs.outputs.keys()
    assert ours.gradients.keys() == theirs.gradients.keys()
    outputs = max(distance(ours.outputs[n], x, 1e-3) for n, x in theirs.outputs.items())
    # some gradients are zero but for rounding, such as that of the bias of the keys
    sizes = [float(g.abs().max()) for g in theirs.gradients.values()]
    least = max(sizes, default=0.0) / 100 or 1.0
    gradients = (distance(ours.gradients[n], g, least) for n, g in theirs.gradients.items())
    return outputs, max(gradients, default=0.0)


def converted(call: Call, dtype: torch.dtype, device: str = "cpu") -> Call:
    """The same call in another dtype, on another device."""

    def moved(x: Any) -> Any:
        if isinstance(x, Tensor):
            return x.to(device, dtype if x.is_floating_point() else x.dtype)
        if isinstance(x, Mapping):
            return {name: moved(value) for name, value in x.items()}
        if isinstance(x, list | tuple):
            return type(x)(moved(value) for value in x)
        if is_dataclass(x) and not isinstance(x, type):
            return replace(x, **{f.name: moved(getattr(x, f.name)) for f in fields(x)})
        return x

    return Call(call.method, moved(call.arguments))


def generated(model: Any, call: Call) -> Tensor | None:
    """The tokens of greedy generation with a cache; None where the class cannot."""
    if not model.can_generate() or call.method != "forward":
        return None
    arguments = {
        n: x.clone() if isinstance(x, Tensor) else x  # some write into their inputs
        for n, x in call.arguments.items()
        if not n.startswith("decoder_")
    }
    if getattr(model.config, "is_encoder_decoder", False):
        arguments["decoder_start_token_id"] = 1
    torch.manual_seed(0)
    was_training = model.training
    model.eval()
    out = model.generate(**arguments, do_sample=False, min_new_tokens=4, max_new_tokens=4)
    model.train(was_training)
    return out if isinstance(out, Tensor) else out.sequences
