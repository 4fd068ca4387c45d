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

# eager itself is off by about 1e-4: it adds N x N terms to 32 sums, one after the other, in fp32
TOLERANCE = 1e-3
EAGER, DEFAULT, PATCHED = "eager", "default", "flashpatch"


@dataclass(frozen=True)
class Setting:
    """One model and input, small enough to send to another process."""

    device: str
    tokens: int
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
        gradient_errors: Per step, the largest relative difference of a bias gradient to eager's.
    """

    setting: Setting
    steps: Sequence[Step]
    gradient_errors: Sequence[float]

    def failures(self) -> list[str]:
        """What should have been otherwise, a sentence each."""
        found = []
        if not self.gradient_errors[-1] < TOLERANCE:
            found.append(
                f"T5's bias gradient differs by {self.gradient_errors[-1]:.1e}, more than "
                f"{TOLERANCE:.0e}"
            )
        if not self.steps[-1].peak_bytes < self.steps[0].peak_bytes:
            found.append("T5's training step does not need less memory than eager's")
        return found


def measure(console: Console, device: torch.device, *, quick: bool = False) -> T5:
    """Takes one training step per attention, each in a process of its own."""
    setting = Setting(str(device), tokens=3072)
    if quick:
        setting = Setting(str(device), tokens=768, layers=1, width=64, heads=4, feed_forward=64)
    default = T5ForConditionalGeneration(setting.config()).config._attn_implementation
    steps = []
    for attention in [EAGER, *([DEFAULT] if default != EAGER else []), PATCHED]:
        with console.status(f"{attention}: one training step at {setting.tokens} tokens"):
            steps.append(measuring.in_fresh_process(train, setting, attention))
    reference = steps[0].bias_gradients
    errors = [
        max(
            ((gradient - reference[name]).norm() / reference[name].norm()).item()
            for name, gradient in step.bias_gradients.items()
        )
        for step in steps
    ]
    return T5(setting, steps, errors)


def train(setting: Setting, attention: str) -> Step:
    """One training step under one attention; everything is the same but that."""
    transformers.logging.set_verbosity_error()
    device = torch.device(setting.device)
    config = setting.config()
    if attention == EAGER:
        config._attn_implementation = EAGER
    torch.manual_seed(0)
    with device:
        model = T5ForConditionalGeneration(config)
    words, report = attention, ""
    if attention == DEFAULT:
        words = f"transformers' default ({model.config._attn_implementation})"
    if attention == PATCHED:
        report = str(flashpatch.apply(model))

    data = torch.tensor(list(text.stream(2 * setting.tokens)), device=device)[None] + 3

    def step(tokens: int) -> float:
        model.zero_grad(set_to_none=True)
        source, target = data[:, : 2 * tokens].chunk(2, dim=1)
        # the decoder reads one byte behind what it predicts
        behind = data[:, tokens - 1 : 2 * tokens - 1]
        loss = model(
            input_ids=source, decoder_input_ids=behind, labels=target, use_cache=False
        ).loss
        loss.backward()
        return loss.item()

    # what happens once: imports on a CPU; on a GPU compilation too, which depends on sizes
    step(16 if device.type == "cpu" else setting.tokens)
    model.zero_grad(set_to_none=True)
    loss, seconds, peak_bytes = measuring.measured(lambda: step(setting.tokens), device)
    return Step(words, seconds, peak_bytes, loss, _bias_gradients(model), report)


def _bias_gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients that reached the relative position biases, by parameter name."""
    gradients = {}
    for name, parameter in model.named_parameters():
        if name.endswith("relative_attention_bias.weight"):
            if parameter.grad is None:
                raise RuntimeError(f"no gradient reached {name}")
            gradients[name] = parameter.grad.cpu()
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
    for heading in ("peak memory", "time", "loss", "bias gradient"):
        table.add_column(heading, justify="right")
    for step, error in zip(result.steps, result.gradient_errors, strict=True):
        table.add_row(
            step.attention,
            f"{step.peak_bytes / 2**20:,.0f} MiB",
            f"{step.seconds:.2f} s",
            f"{step.loss:.5f}",
            "reference" if step is eager else f"differs by {error:.1e}",
            style="bold" if step is patched else "",
        )
    console.print(table)
    console.print(
        f"\n  [bold]{eager.peak_bytes / patched.peak_bytes:.1f}x[/] less memory and "
        f"[bold]{eager.seconds / patched.seconds:.2f}x[/] the speed of eager"
    )
