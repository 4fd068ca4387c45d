"""The three parts of the demo in order, and the verdict."""

import json
import platform
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.markup import escape

from flashpatch import __version__
from flashpatch.demo import embeddings, measure, t5, training


def run(
    out: Path,
    device: str | None,
    *,
    quick: bool = False,
    start: float | None = None,
    console: Console | None = None,
) -> list[str]:
    """Measures, shows and saves all three parts.

    Args:
        out: Folder for `loss.png` and `demo.json`.
        device: Where the models run; None means the GPU if there is one.
        quick: Toy sizes.
        start: Since when to count the time, of `perf_counter`; None means now.
        console: Where to print; None means the terminal.

    Returns:
        What failed, a sentence each; empty when all is well.

    Raises:
        ValueError: The device is none that this torch can use.
    """
    start = perf_counter() if start is None else start
    console = console or Console(highlight=False)
    place = _device(device)
    measure.prepare(t5.__name__)
    out.mkdir(parents=True, exist_ok=True)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    console.print(
        f"[bold]flashpatch {__version__}[/]  torch {torch.__version__}, transformers "
        f"{transformers.__version__}, {_name(place)}\n"
    )
    console.rule("[bold]1  Real sentences, real weights: the same embeddings[/]", align="left")
    first = embeddings.measure(place, quick=quick)
    embeddings.show(first, console)

    console.print()
    console.rule("[bold]2  T5 on long input: less memory, the same gradients[/]", align="left")
    second = t5.measure(console, place, quick=quick)
    t5.show(second, console)

    console.print()
    console.rule("[bold]3  Training on real text: the same curve[/]", align="left")
    third = training.measure(console, place, quick=quick)
    picture = out / "loss.png"
    training.draw(third, picture)
    training.show(third, picture, console)

    failures = [*first.failures(), *second.failures(), *third.failures()]
    seconds = perf_counter() - start
    record = {
        "device": _name(place),
        "versions": {
            "flashpatch": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "seconds": seconds,
        "failures": failures,
        "embeddings": asdict(first),
        "t5": asdict(second),
        "training": asdict(third),
    }
    (out / "demo.json").write_text(json.dumps(record, indent=1, default=_plain) + "\n")

    console.print()
    console.rule()
    for failure in failures:
        console.print(f"[bold red]failed[/]  {escape(failure)}")
    verdict = "[bold red]The demo failed[/]" if failures else "[bold green]All as it should be[/]"
    console.print(f"{verdict}, in {seconds:.0f} s. Every number: {escape(str(out / 'demo.json'))}")
    return failures


def _device(name: str | None) -> torch.device:
    """The device of this name, tried out."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (AssertionError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"no device {name!r} here: {reason}") from error
    return device


def _name(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {device.type}, {torch.get_num_threads()} threads"


def _plain(value: Any) -> Any:
    """Tensors as nested lists, for JSON."""
    return value.tolist()
