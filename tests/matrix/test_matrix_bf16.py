"""Every model type as a tiny model in bfloat16: it errs no more than PyTorch does.

The oracle is the model's own attention in float32, the yardstick the same in bfloat16, under
autocast where the model cannot be in bfloat16 itself. The engines are those that the dispatcher
chooses; `benchmarks/matrix_gpu.py` writes down what ran on a GPU.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import pytest
import torch
from matrix import models
from matrix.models import Step
from matrix.row import Row
from torch import Tensor
from transformers import CONFIG_MAPPING

import flashpatch
from flashpatch.architectures import attention_classes
from flashpatch.inspection import calls_interface

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),  # of what models warn, and of TensorFloat-32
]

GPU = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
)
# Beside twice PyTorch's error: what a few roundings of a whole tensor may add.
ROUNDING = 4 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("model_type", sorted(CONFIG_MAPPING))
def test_a_model_errs_no_more_than_pytorch(model_type, device, monkeypatch, record_property):
    """A model that takes the largest few of something (experts, keys, boxes) may take others after
    any rounding. So what fails is drawn again, and the medians must hold."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    row = models.row_or_skip(model_type)
    if device == "cpu" and all(map(calls_interface, attention_classes(model_type))):
        pytest.skip("nothing is read, and PyTorch's own attention serves it")
    draws = [drawn(model_type, row, device, seed=0)]
    if not hold(draws):
        draws += [drawn(model_type, row, device, seed) for seed in range(1, 5)]
    for draw in draws:
        record_property("draw", json.dumps(asdict(draw)))
    assert hold(draws)


@dataclass(frozen=True)
class Draw:
    """What a model with random weights gave.

    Attributes:
        engines: How many calls each engine computed.
        errors: For each call and kind of tensors ours, and that of the model's own attention.
    """

    engines: Mapping[str, int]
    errors: Sequence[tuple[float, float]]


def hold(draws: Sequence[Draw]) -> bool:
    """Whether no error is too large, of each call in the median of the draws."""
    for errors in zip(*(draw.errors for draw in draws), strict=True):
        ours, theirs = (median(column) for column in zip(*errors, strict=True))
        if ours > 2 * theirs + ROUNDING:
            return False
    return True


def drawn(model_type: str, row: Row, device: str, seed: int) -> Draw:
    """Computes one, its weights and arguments numbers of bfloat16 in all three ways."""
    model = models.build(model_type, row, seed).bfloat16().float()
    given = [models.converted(call, torch.bfloat16) for call in models.all_calls(model, row)]
    half, full = (
        [models.converted(call, dtype, device) for call in given]
        for dtype in (torch.bfloat16, torch.float32)
    )
    exact = [models.step(model.to(device), call) for call in full]
    calls, autocast = half, nullcontext()
    try:
        theirs = [models.step(model.bfloat16(), call) for call in calls]
    except (RuntimeError, TypeError, ValueError):  # models that mix dtypes are made for autocast
        calls, autocast = full, torch.autocast(device, torch.bfloat16)
        try:
            with autocast:
                theirs = [models.step(model.float(), call) for call in calls]
        except NotImplementedError as error:
            pytest.skip(f"PyTorch cannot: {error}")
    reasons: list[Any] = []
    flashpatch.apply(model, on_fallback=reasons.append)
    with models.counted(model) as served, autocast:
        ours = [models.step(model, call) for call in calls]
    assert not reasons, reasons
    assert served.engines
    assert device == "cpu" or "tiled" not in served.engines
    pairs = [
        (errors(what, one, truth), errors(what, other, truth))
        for one, other, truth in zip(ours, theirs, exact, strict=True)
        for what in ("outputs", "gradients")
    ]
    return Draw(dict(served.engines), pairs)


def errors(what: str, step: Step, exact: Step) -> float:
    """The error of all tensors as one, each relative to its size.

    A tensor that is zero but for rounding, as the gradient of the keys' bias is, has no size of its
    own to compare with: it is taken to be no smaller than a hundredth of the largest.
    """
    truths = {name: numbers(x) for name, x in getattr(exact, what).items()}
    sizes = {name: float(x.square().mean().sqrt()) for name, x in truths.items()}
    least = max(sizes.values(), default=0.0) / 100 or 1.0
    given = getattr(step, what)
    squares = [
        float((numbers(given[name]) - truth).square().mean()) / max(sizes[name], least) ** 2
        for name, truth in truths.items()
    ]
    return (sum(squares) / max(len(squares), 1)) ** 0.5


def numbers(x: Tensor) -> Tensor:
    return x.cpu().double().nan_to_num(0.0, 0.0, 0.0)
