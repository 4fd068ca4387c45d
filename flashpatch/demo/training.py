"""Part 3: a small decoder learns the same from the same seed, patched and unpatched."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from transformers import Gemma2Config, Gemma2ForCausalLM

import flashpatch
from flashpatch.demo import text

# nats per byte: of the first steps, and at the end, when rounding has grown with every step
EARLY, EARLY_TOLERANCE = 20, 1e-4
TOLERANCE = 2e-2
ROWS = 8
STOCK_COLOUR, PATCHED_COLOUR = "#f2a65a", "#1f3b73"


@dataclass(frozen=True)
class Training:
    """What was measured.

    Attributes:
        parameters: Of the model.
        batch: Texts per step; context: bytes per text.
        stock: Loss of each step without flashpatch, in nats per byte.
        patched: Loss of each step with it.
        unseen: Both models' loss on text that none was trained on.
        served: How many attention modules flashpatch took over.
        report: What `apply` said.
    """

    parameters: int
    batch: int
    context: int
    stock: Sequence[float]
    patched: Sequence[float]
    unseen: tuple[float, float]
    served: int
    report: str

    def failures(self) -> list[str]:
        """What should have been otherwise, a sentence each."""
        found = []
        gap = abs(self.unseen[0] - self.unseen[1])
        if not self.served:
            found.append("flashpatch serves none of the decoder's attention modules")
        early = zip(self.stock[:EARLY], self.patched[:EARLY], strict=True)
        if not all(abs(patched - stock) < EARLY_TOLERANCE for stock, patched in early):
            found.append(f"the losses part within the first {EARLY} steps")
        if not gap < TOLERANCE:
            found.append(f"the two trained models' losses differ by {gap:.1e}")
        if not self.patched[-1] < self.patched[0]:
            found.append("the patched model did not learn")
        return found


def measure(console: Console, device: torch.device, *, quick: bool = False) -> Training:
    """Trains both models step by step on the same bytes."""
    steps, batch, context = (4, 2, 64) if quick else (200, 4, 128)
    corpus = torch.frombuffer(bytearray(text.stream(2_000_000)), dtype=torch.uint8)
    training, unseen = corpus[:-50_000], corpus[-50_000:]
    models = {"stock": _model(context, device), "patched": _model(context, device)}
    report = flashpatch.apply(models["patched"])
    optimizers, schedules = {}, {}
    for name, model in models.items():
        optimizers[name] = torch.optim.AdamW(model.parameters())
        schedules[name] = OneCycleLR(optimizers[name], 5e-4, total_steps=steps, pct_start=0.1)
    losses: dict[str, list[float]] = {name: [] for name in models}

    bar = Progress(
        TextColumn("  training"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )
    with bar:
        task = bar.add_task("", total=steps, note="")
        for rows in _batches(training, steps, batch, context):
            rows = rows.to(device)
            for name, model in models.items():
                loss = model(input_ids=rows, labels=rows, use_cache=False).loss
                loss.backward()
                # with neither clipping nor warm-up any two runs part, by their last bits alone
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizers[name].step()
                schedules[name].step()
                optimizers[name].zero_grad(set_to_none=True)
                losses[name].append(loss.item())
            now = f"stock {losses['stock'][-1]:.3f}  flashpatch {losses['patched'][-1]:.3f}"
            bar.update(task, advance=1, note=now)

    (rows,) = _batches(unseen, 1, batch * 4, context)
    with torch.no_grad():
        unseen_losses = {
            name: model(input_ids=rows.to(device), labels=rows.to(device)).loss.item()
            for name, model in models.items()
        }
    return Training(
        parameters=sum(parameter.numel() for parameter in models["stock"].parameters()),
        batch=batch,
        context=context,
        stock=losses["stock"],
        patched=losses["patched"],
        unseen=(unseen_losses["stock"], unseen_losses["patched"]),
        served=report.served,
        report=str(report),
    )


def _model(context: int, device: torch.device) -> nn.Module:
    """A byte-level Gemma 2; each call the same weights.

    Of that family because no attention of PyTorch's takes its soft-capped scores at any size:
    flashpatch's own engines have to.
    """
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        query_pre_attn_scalar=32,
        max_position_embeddings=context,
        sliding_window=context // 4,
    )
    with device:
        return Gemma2ForCausalLM(config).train()


def _batches(corpus: Tensor, steps: int, batch: int, context: int) -> Iterator[Tensor]:
    """Random windows of the text, the same at each call: [batch, context]."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        starts = torch.randint(len(corpus) - context, (batch, 1), generator=generator)
        yield corpus[starts + torch.arange(context)].long()


def draw(result: Training, path: Path) -> None:
    """Both loss curves in one picture, their difference below it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    curves, gap = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    steps = range(1, len(result.stock) + 1)
    curves.plot(steps, result.stock, color=STOCK_COLOUR, linewidth=5, label="transformers")
    curves.plot(steps, result.patched, color=PATCHED_COLOUR, linewidth=1.2, label="flashpatch")
    curves.set_ylabel("loss (nats per byte)")
    curves.set_title("One decoder, one seed, the same text: trained with and without flashpatch")
    curves.legend(frameon=False)
    gap.plot(
        steps,
        [b - a for a, b in zip(result.stock, result.patched, strict=True)],
        color=PATCHED_COLOUR,
        linewidth=1.2,
    )
    gap.axhline(0, color=STOCK_COLOUR, linewidth=1, zorder=0)
    gap.set_ylabel("difference")
    gap.ticklabel_format(axis="y", scilimits=(-2, 2))
    gap.set_xlabel("training step")
    for axes in (curves, gap):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.savefig(path)


def show(result: Training, picture: Path, console: Console) -> None:
    """Prints the losses along the way and where the picture is."""
    console.print(
        f"A byte-level Gemma 2 of {result.parameters / 1e6:.1f} million parameters, trained twice "
        f"from one seed, {result.batch} texts of {result.context} bytes a step. A wrong gradient "
        "would drive the curves apart.\n"
    )
    console.print(escape(result.report), highlight=False, soft_wrap=True)
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for heading in ("step", "transformers", "flashpatch", "difference"):
        table.add_column(heading, justify="right")
    last = len(result.stock) - 1
    for index in sorted({round(last * row / (ROWS - 1)) for row in range(ROWS)}):
        stock, patched = result.stock[index], result.patched[index]
        table.add_row(
            str(index + 1), f"{stock:.4f}", f"{patched:.4f}", f"{abs(patched - stock):.1e}"
        )
    stock, patched = result.unseen
    table.add_row(
        "unseen text", f"{stock:.4f}", f"{patched:.4f}", f"{abs(patched - stock):.1e}", style="bold"
    )
    console.print()
    console.print(table)
    console.print(f"\n  both curves: [bold]{escape(str(picture))}[/]", soft_wrap=True)
