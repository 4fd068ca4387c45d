"""Whole models on a CPU: what flashpatch saves a T5, and that it costs BERT and llama nothing.

    python benchmarks/models_cpu.py                     # everything, about 20 minutes
    python benchmarks/models_cpu.py --only t5 llama     # some of it

Random weights at real widths, fp32. Two kinds of rows:

* `t5`: a training step of T5-base under each attention. Each in a process of its own, two steps:
  peak memory (resident, above what the model takes) of the first, time of the faster. Bars against
  eager: 0.85 of its time, 0.4 of its peak. With dropout (T5's default, 0.1) eager's step at 2048
  tokens needs more memory than the machine it was written on has, so those rows are at 1024.
* `bert`, `llama`: a few layers alone, without a language-model head that would dilute the ratio;
  the fewer, the longer the text, because single pairs differ by 5% and only many of them tell 1%.
  Two models that share their weights, one patched, run in turn in one process, first one first,
  then the other; the ratio of each pair, their median. Bar: 1.03. `padded` batches differ in length
  as a data loader's do; `full` ones come with a mask of ones.

Exit status 1 says that a bar was missed or that two attentions disagree.
"""

import argparse
import copy
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

import flashpatch
from flashpatch.demo.measure import in_fresh_process, measured

T5_TIME, T5_MEMORY, NEVER_SLOWER = 0.85, 0.4, 1.03
# fp32 sums in another order, through every layer
AGREEMENT = 1e-4
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Row:
    """One measured configuration.

    Attributes:
        case: Model, and what else tells it from its siblings.
        attention: What was measured: eager, sdpa or flashpatch.
        tokens: Sequence length.
        seconds: Of one forward pass or training step; for pairs the median.
        ratio: Of the time to the baseline's (t5: eager, others: sdpa); None for the baseline.
        peak_mib: Peak memory of the step; None where it is not measured.
        memory_ratio: Of the peak to the baseline's.
        difference: Relative difference of loss or hidden states to the baseline's.
        pairs: How many pairs the ratio is the median of.
        spread: First and third quartile of the pairs' ratios.
        met: Whether the bar is met; None where there is none.
    """

    case: str
    attention: str
    tokens: int
    seconds: float
    ratio: float | None = None
    peak_mib: float | None = None
    memory_ratio: float | None = None
    difference: float | None = None
    pairs: int | None = None
    spread: tuple[float, float] | None = None
    met: bool | None = None


@dataclass(frozen=True)
class Sizes:
    """How large everything is; `TINY` only shows that the script runs.

    `lengths` are numbers of tokens, each with how many layers run on them.
    """

    t5: dict[str, Any]
    t5_tokens: tuple[int, int]
    width: int
    lengths: dict[int, int]
    seconds_per_case: float
    pairs: tuple[int, int]


FULL = Sizes(
    t5={"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12},
    t5_tokens=(2048, 1024),
    width=768,
    lengths={128: 4, 512: 2, 1024: 1},
    seconds_per_case=45.0,
    pairs=(9, 61),
)
TINY = Sizes(
    t5={"d_model": 64, "d_kv": 32, "d_ff": 64, "num_layers": 1, "num_heads": 2},
    t5_tokens=(192, 160),
    width=128,
    lengths={160: 1},
    seconds_per_case=0.0,
    pairs=(2, 2),
)


def t5_rows(sizes: Sizes) -> Iterator[Row]:
    """A training step of T5 under eager, sdpa and flashpatch, without and with dropout."""
    for dropout, tokens in zip((0.0, 0.1), sizes.t5_tokens, strict=True):
        baseline = None
        for attention in ("eager", "sdpa", "flashpatch"):
            step = in_fresh_process(t5_step, sizes.t5, tokens, dropout, attention)
            seconds, peak, loss = step["seconds"], step["peak_bytes"], step["loss"]
            row: dict[str, Any] = {
                "case": f"t5 train, dropout {dropout}",
                "attention": attention,
                "tokens": tokens,
                "seconds": seconds,
                "peak_mib": peak / 2**20,
            }
            if baseline is None:
                baseline = step
            else:
                row["ratio"] = seconds / baseline["seconds"]
                row["memory_ratio"] = peak / baseline["peak_bytes"]
                if dropout == 0.0:
                    row["difference"] = abs(loss - baseline["loss"]) / abs(baseline["loss"])
            if attention == "flashpatch" and dropout == 0.0:
                row["met"] = (
                    row["ratio"] <= T5_TIME
                    and row["memory_ratio"] <= T5_MEMORY
                    and row["difference"] <= AGREEMENT
                )
            yield Row(**row)


def t5_step(
    size: dict[str, Any], tokens: int, dropout: float, attention: str, threads: int = 2
) -> dict[str, float]:
    """Two training steps; runs in a process of its own."""
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    config = T5Config(**size, vocab_size=32128, dropout_rate=dropout)
    config._attn_implementation = "eager" if attention == "eager" else "sdpa"
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(config).train()
    if attention == "flashpatch":
        flashpatch.apply(model)
    ids = torch.randint(5, 32000, (1, tokens))
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "decoder_input_ids": ids.roll(1, dims=1),
        "labels": ids,
    }

    def step() -> float:
        model.zero_grad(set_to_none=True)
        loss = model(**batch).loss
        loss.backward()
        return loss.item()

    loss, first, peak_bytes = measured(step, CPU)
    _, second, _ = measured(step, CPU)
    return {"seconds": min(first, second), "peak_bytes": peak_bytes, "loss": loss}


def bert(sizes: Sizes, tokens: int, dropout: float) -> PreTrainedModel:
    """BERT-base's layers."""
    config = BertConfig(
        hidden_size=sizes.width,
        intermediate_size=4 * sizes.width,
        num_attention_heads=sizes.width // 64,
        num_hidden_layers=sizes.lengths[tokens],
        max_position_embeddings=tokens,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return BertModel(config, add_pooling_layer=False)


def llama(sizes: Sizes, tokens: int, dropout: float) -> PreTrainedModel:
    """A llama of BERT's width with grouped-query attention."""
    config = LlamaConfig(
        hidden_size=sizes.width,
        intermediate_size=sizes.width * 8 // 3,
        num_attention_heads=sizes.width // 64,
        num_key_value_heads=max(1, sizes.width // 192),
        num_hidden_layers=sizes.lengths[tokens],
        max_position_embeddings=tokens,
        attention_dropout=dropout,
        vocab_size=32000,
    )
    return LlamaModel(config)


Build = Callable[[Sizes, int, float], PreTrainedModel]


def pair_rows(name: str, build: Build, sizes: Sizes) -> Iterator[Row]:
    """Forward passes and training steps, padded and full, at each length."""
    for tokens in sizes.lengths:
        for padded in (False, True):
            for train, dropout in ((False, 0.0), (True, 0.0)):
                yield pair(name, build, sizes, tokens, padded, train, dropout)
    middle = list(sizes.lengths)[len(sizes.lengths) // 2]
    if build is bert:
        yield pair(name, build, sizes, middle, True, True, 0.1)


def pair(
    name: str, build: Build, sizes: Sizes, tokens: int, padded: bool, train: bool, dropout: float
) -> Row:
    """Times stock and patched model in turn."""
    torch.manual_seed(0)
    stock = build(sizes, tokens, dropout).train(train)
    if stock.config._attn_implementation != "sdpa":
        raise RuntimeError(f"{name} does not default to sdpa here")
    shared: dict[int, Any] = {id(parameter): parameter for parameter in stock.parameters()}
    patched = copy.deepcopy(stock, shared)
    report = flashpatch.apply(patched)
    if report.served != report.total:
        raise RuntimeError(f"not all of {name} is served:\n{report}")

    ids = torch.randint(5, 30000, (2, tokens))
    mask = torch.ones_like(ids)
    if padded and name == "bert":
        mask[1, tokens * 3 // 4 :] = 0
    elif padded:
        mask[1, : tokens // 4] = 0

    def run(model: PreTrainedModel) -> torch.Tensor:
        extra = {} if name == "bert" else {"use_cache": False}
        with torch.set_grad_enabled(train):
            hidden = model(input_ids=ids, attention_mask=mask, **extra).last_hidden_state
            if train:
                hidden.square().mean().backward()
                model.zero_grad(set_to_none=True)
        return hidden.detach()[mask.bool()]

    def timed(model: PreTrainedModel) -> float:
        start = time.perf_counter()
        run(model)
        return time.perf_counter() - start

    expected, got = run(stock), run(patched)
    difference = None
    if not dropout:
        difference = ((got - expected).norm() / expected.norm()).item()
    times: list[tuple[float, float]] = []
    fewest, most = sizes.pairs
    end = time.perf_counter() + sizes.seconds_per_case
    while len(times) < fewest or (len(times) < most and time.perf_counter() < end):
        if len(times) % 2:
            after = timed(patched)
            times.append((timed(stock), after))
        else:
            before = timed(stock)
            times.append((before, timed(patched)))
    ratios = sorted(after / before for before, after in times)
    ratio = statistics.median(ratios)
    kind = f"{'train' if train else 'forward'}, {'padded' if padded else 'full'}"
    gc.collect()
    return Row(
        case=f"{name} {kind}" + (f", dropout {dropout}" if dropout else ""),
        attention="flashpatch",
        tokens=tokens,
        seconds=statistics.median(after for _, after in times),
        ratio=ratio,
        difference=difference,
        pairs=len(times),
        spread=(ratios[len(ratios) // 4], ratios[len(ratios) * 3 // 4]),
        met=ratio <= NEVER_SLOWER and (difference is None or difference <= AGREEMENT),
    )


def conditions(threads: int) -> dict[str, Any]:
    """What the numbers depend on."""
    root = Path(__file__).parent
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    described = subprocess.run(git, capture_output=True, text=True, check=False)
    versions = {"python": platform.python_version(), "flashpatch": flashpatch.__version__}
    for package in ("torch", "transformers", "triton", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": described.stdout.strip() or "unknown",
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "load_before": os.getloadavg() if hasattr(os, "getloadavg") else None,
        "dtype": "float32",
        "versions": versions,
    }


def _cpu_name() -> str:
    """The processor's name and instruction set, as far as the system tells."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = models[0].split(":")[1].strip() if models else name
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def shown(row: Row) -> str:
    """The row as a line of the table."""

    def cell(value: float | None, pattern: str) -> str:
        return "" if value is None else format(value, pattern)

    verdict = {True: "ok", False: "MISSED", None: ""}[row.met]
    return (
        f"{row.case:<34}{row.tokens:>6}  {row.attention:<11}{row.seconds * 1e3:>10,.0f} ms"
        f"{cell(row.ratio, '.3f'):>8}{cell(row.peak_mib, ',.0f'):>9}"
        f"{cell(row.memory_ratio, '.3f'):>8}{cell(row.difference, '.0e'):>8}  {verdict}"
    )


def main() -> int:
    """Runs the chosen parts, prints and saves their rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=("t5", "bert", "llama"))
    parser.add_argument("--out", type=Path, help="folder of models_cpu.json")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="toy sizes, no bars")
    arguments = parser.parse_args()
    only = arguments.only or ("t5", "bert", "llama")
    sizes = TINY if arguments.tiny else FULL
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()

    record = conditions(arguments.threads)
    print(f"{record['cpu']}, {arguments.threads} threads, commit {record['commit'][:12]}")
    print(
        f"{'case':<34}{'tokens':>6}  {'attention':<11}{'time':>13}{'ratio':>8}"
        f"{'MiB':>9}{'ratio':>8}{'diff':>8}"
    )
    start = time.perf_counter()
    rows = []
    parts = {
        "t5": lambda: t5_rows(sizes),
        "bert": lambda: pair_rows("bert", bert, sizes),
        "llama": lambda: pair_rows("llama", llama, sizes),
    }
    for part in only:
        for row in parts[part]():
            print(shown(row), flush=True)
            rows.append(row)
    record["seconds"] = round(time.perf_counter() - start, 1)
    record["bars"] = {
        "t5 time": T5_TIME,
        "t5 memory": T5_MEMORY,
        "bert and llama": NEVER_SLOWER,
        "difference": AGREEMENT,
    }
    record["rows"] = [asdict(row) for row in rows]
    folder = arguments.out or Path(__file__).parent / "results"
    folder.mkdir(parents=True, exist_ok=True)
    name = "models_cpu.json" if set(only) == set(parts) else f"models_cpu_{'_'.join(only)}.json"
    (folder / name).write_text(json.dumps(record, indent=1) + "\n")
    print(f"{record['seconds']:.0f} s, {folder / name}")
    return 0 if arguments.tiny else int(any(row.met is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())
