"""Part 2: a training step of a T5 on long input, without its (1, H, N, N) bias and scores."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import transformers
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

import flashpatch
from flashpatch.demo import measure as measuring
from flashpatch.demo import text

# of a gradient, relative: what rounding alone may do
ROUNDING = 1e-5
EAGER, DEFAULT, PATCHED = "eager", "default", "flashpatch"


@dataclass(frozen=True)
class Setting:
    """One model and input, small enough to send to another process.

    Attributes:
        device: Where it runs.
        tokens: Length of the step that is measured.
        checked: Length of the step whose gradients are compared with float64's.
    """

    device: str
    tokens: int
    checked: int
    layers: int = 2
    width: int = 512
    heads: int = 8
    feed_forward: int = 1024

    def config(self) -> T5Config:
        """T5-small's width on ByT5's vocabulary: bytes, shifted by three special tokens.

        Without dropout and, as in ByT5, without ReLUs: a unit that rounding pushes across ReLU's
        kink changes gradients more than any attention does.
        """
        return T5Config(
            vocab_size=384,
            d_model=self.width,
            d_kv=64,
            d_ff=self.feed_forward,
            num_layers=self.layers,
            num_heads=self.heads,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )


@dataclass(frozen=True)
class Step:
    """One training step.

    Attributes:
        attention: Who computed the attention, in words.
        seconds: Forward and backward.
        peak_bytes: Memory at the peak, above what the model took.
        loss: Its loss.
        bias_gradients: Gradient of each `relative_attention_bias.weight`, by name.
        report: What `apply` said; empty where it was not called.
    """

    attention: str
    seconds: float
    peak_bytes: int
    loss: float
    bias_gradients: dict[str, Tensor]
    report: str


@dataclass(frozen=True)
class T5:
    """What was measured: eager first, flashpatch last, transformers' default between if it differs.

    Attributes:
        setting: Model and input.
        steps: One per attention.
        gradient_errors: Per step, the largest relative error of a bias gradient, against float64.
    """

    setting: Setting
    steps: Sequence[Step]
    gradient_errors: Sequence[float]

    def failures(self) -> list[str]:
        """What should have been otherwise, a sentence each."""
        found = []
        eager, patched = self.gradient_errors[0], self.gradient_errors[-1]
        if not patched <= 2 * eager + ROUNDING:
            found.append(f"T5's bias gradient is off by {patched:.1e}, eager's by {eager:.1e}")
        if not self.steps[-1].peak_bytes < self.steps[0].peak_bytes:
            found.append("T5's training step does not need less memory than eager's")
        return found


def measure(console: Console, device: torch.device, *, quick: bool = False) -> T5:
    """Takes one training step per attention, each in a process of its own."""
    setting = Setting(str(device), tokens=2560, checked=1024)
    if quick:
        toy = {"layers": 1, "width": 64, "heads": 4, "feed_forward": 64}
        setting = Setting(str(device), tokens=768, checked=256, **toy)
    default = T5ForConditionalGeneration(setting.config()).config._attn_implementation
    steps = []
    for attention in [EAGER, *([DEFAULT] if default != EAGER else []), PATCHED]:
        with console.status(f"{attention}: one training step at {setting.tokens} tokens"):
            steps.append(measuring.in_fresh_process(train, setting, attention))
    with console.status("the same gradients in float64"):
        exact = _exact_gradients(setting)
    errors = [
        max(
            ((gradient - exact[name]).norm() / exact[name].norm()).item()
            for name, gradient in step.bias_gradients.items()
        )
        for step in steps
    ]
    return T5(setting, steps, errors)


def train(setting: Setting, attention: str) -> Step:
    """One training step under one attention; everything is the same but that."""
    transformers.logging.set_verbosity_error()
    device = torch.device(setting.device)
    model = _model(setting, EAGER if attention == EAGER else None)
    words, report = attention, ""
    if attention == DEFAULT:
        words = f"default ({model.config._attn_implementation})"
    if attention == PATCHED:
        report = str(flashpatch.apply(model))

    # what happens once: imports on a CPU; on a GPU compilation too, which depends on sizes
    _step(model, 16 if device.type == "cpu" else setting.tokens)
    model.zero_grad(set_to_none=True)
    loss, seconds, peak_bytes = measuring.measured(lambda: _step(model, setting.tokens), device)
    model.zero_grad(set_to_none=True)
    _step(model, setting.checked)
    return Step(words, seconds, peak_bytes, loss, _bias_gradients(model), report)


def _exact_gradients(setting: Setting) -> dict[str, Tensor]:
    """The bias gradients in float64.

    Those of eager in float32 are no reference: it adds N x N terms to 32 sums, one after the other,
    and is off by 1e-3 at 3072 tokens.
    """
    model = _model(setting, EAGER).double()
    _step(model, setting.checked)
    return _bias_gradients(model)


def _model(setting: Setting, attention: str | None) -> T5ForConditionalGeneration:
    """The model, the same weights at each call; None means transformers' default attention."""
    config = setting.config()
    if attention is not None:
        config._attn_implementation = attention
    torch.manual_seed(0)
    with torch.device(setting.device):
        return T5ForConditionalGeneration(config)


def _step(model: T5ForConditionalGeneration, tokens: int) -> float:
    """Forward and backward: the decoder continues the text that the encoder reads."""
    data = torch.tensor(list(text.stream(2 * tokens)), device=model.device)[None] + 3
    source, target = data.chunk(2, dim=1)
    # the decoder reads one byte behind what it predicts
    behind = data[:, tokens - 1 : -1]
    loss = model(input_ids=source, decoder_input_ids=behind, labels=target, use_cache=False).loss
    loss.backward()
    return loss.item()


def _bias_gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients that reached the relative position biases, by parameter name."""
    gradients = {}
    for name, parameter in model.named_parameters():
        if name.endswith("relative_attention_bias.weight"):
            if parameter.grad is None:
                raise RuntimeError(f"no gradient reached {name}")
            gradients[name] = parameter.grad.double().cpu()
    return gradients


def show(result: T5, console: Console) -> None:
    """Prints one row per attention."""
    setting, eager, patched = result.setting, result.steps[0], result.steps[-1]
    console.print(
        f"A T5 of {setting.layers} + {setting.layers} layers, width {setting.width}, one text of "
        f"{setting.tokens} bytes. Its learned position bias keeps it off every flash kernel; "
        "flashpatch reads the bias as one vector per head and returns its gradient.\n"
    )
    console.print(escape(patched.report), highlight=False, soft_wrap=True)
    console.print()
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("one training step")
    for heading in ("peak memory", "time", "loss", "bias gradient, error"):
        table.add_column(heading, justify="right")
    for step, error in zip(result.steps, result.gradient_errors, strict=True):
        table.add_row(
            step.attention,
            f"{step.peak_bytes / 2**20:,.0f} MiB",
            f"{step.seconds:.2f} s",
            f"{step.loss:.5f}",
            f"{error:.1e}",
            style="bold" if step is patched else "",
        )
    console.print(table)
    console.print(
        f"\n  [bold]{eager.peak_bytes / patched.peak_bytes:.1f}x[/] less memory and "
        f"[bold]{eager.seconds / patched.seconds:.2f}x[/] the speed of eager. "
        f"The gradients are those at {setting.checked} bytes, compared with eager's in float64.",
        soft_wrap=True,
    )
