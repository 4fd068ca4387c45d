"""Which engine computes a call: facts about each engine, as rows over the call's metadata.

An engine is asked before it runs. `why_not` answers with the first requirement that the call does
not meet, `choose` takes the first engine that can and is the better choice. Nothing here looks at
data, so that tracing, CUDA graphs and the recomputation of a checkpoint all decide alike.

Letters: B batch, H query heads, H_kv key heads, N queries, M keys, D head size, Dv that of v.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from flashpatch_kernels import tuning
from flashpatch_kernels.masks import Band, Boolean, Intervals
from flashpatch_kernels.options import Options


def _triton_version() -> tuple[int, int]:
    """Of the Triton that is installed, by whatever name, without importing it; 0, 0 if none is."""
    spec = find_spec("triton")
    text = Path(spec.origin).read_text(encoding="utf-8") if spec and spec.origin else ""
    found = re.search(r"__version__ = ['\"](\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


TRITON_INSTALLED = find_spec("triton") is not None
# Triton's language of warps and shared memory, as the Hopper kernels write it.
GLUON_INSTALLED = _triton_version() >= (3, 6)

# Up to so many scores per head, PyTorch's attention is the fastest on a CPU even if a mask or a
# bias is materialised for it. A mask serves all heads; a bias is a matrix of each.
# Measured on an AMD EPYC with 12 heads of 64, forward and backward, tiled's time over PyTorch's:
#     length            128    256    512   1024
#     padded causal     2.1    1.6    1.2    0.5
#     table             1.8    1.1    1.3    -
#     dropout           1.8    1.2    0.7    -
SMALL_MASK = 512 * 512
SMALL_BIAS = 256 * 256


@dataclass(frozen=True)
class Reason:
    """Why an engine does not take a call: a name to test for and a sentence for people."""

    name: str
    text: str

    def __str__(self) -> str:
        return self.text


class Call(NamedTuple):
    """What can be known of an attention call without looking at data.

    The defaults describe a plain call, so that a report can ask about one before it is made.

    Attributes:
        capability: Compute capability of the CUDA device, None on another device.
        dtype: Of q, after autocast.
        mixed: Whether q, k and v differ in dtype or device.
        mask: The mask's record: `Band` with its numbers; the others by kind.
        aligned: Whether every row of q, k and v starts at a multiple of 16 bytes.
        one_row: Whether every query sees the same keys, as far as the shapes tell.
        table: Whether there is a bias by distance, of a table.
        table_grad: Whether it takes a gradient, even if none are recorded now: what a checkpoint
            computes again it decides alike.
        slopes: Whether there is one that is proportional to the distance.
        needs_grad: Whether a gradient may be asked for.
        lse: Whether the caller wants the log-sum-exp.
    """

    device: str = "cuda"
    capability: tuple[int, int] | None = None
    dtype: torch.dtype = torch.float32
    mixed: bool = False
    aligned: bool = True
    batch: int = 1
    heads: int = 1
    kv_heads: int = 1
    n_queries: int = 1024
    n_keys: int = 1024
    head_size: int = 64
    value_size: int = 64
    mask: type[Band] | type[Intervals] | type[Boolean] = Band
    band: Band | None = Band()
    one_row: bool = True
    softcap: bool = False
    table: bool = False
    table_grad: bool = False
    slopes: bool = False
    relative: bool = False
    score: bool = False
    bias: bool = False
    bias_one_row: bool = False
    bias_grad: bool = False
    sinks: bool = False
    dropout: float = 0.0
    needs_grad: bool = False
    lse: bool = False

    @staticmethod
    def of(q: Tensor, k: Tensor, v: Tensor, options: Options, *, lse: bool = False) -> "Call":
        """The record of a call with these tensors."""
        mask, bias = options.mask, options.bias
        batch, heads, n_queries, head_size = q.shape
        _, kv_heads, n_keys, _ = k.shape
        dtype = computing_dtype(q)
        grad = torch.is_grad_enabled()
        if isinstance(mask, Band):
            one_row = n_queries == 1 or mask == _FULL
        elif isinstance(mask, Intervals):
            one_row = mask.bounds.shape[1] == 1
        else:
            one_row = mask.allowed.shape[2] == 1
        return Call(
            device=device_type(q),
            capability=_capability(q.device) if q.is_cuda else None,
            dtype=dtype,
            mixed=_mixed(q, k) or _mixed(q, v),
            aligned=_aligned(q) and _aligned(k) and _aligned(v),
            batch=batch,
            heads=heads,
            kv_heads=kv_heads,
            n_queries=n_queries,
            n_keys=n_keys,
            head_size=head_size,
            value_size=v.shape[3],
            mask=type(mask),
            band=mask if isinstance(mask, Band) else None,
            one_row=one_row,
            softcap=options.softcap is not None,
            table=options.table is not None,
            table_grad=options.table is not None and options.table.requires_grad,
            slopes=options.slopes is not None,
            relative=options.relative,
            score=options.score is not None,
            bias=bias is not None,
            bias_one_row=bias is not None and bias.shape[2] == 1,
            bias_grad=grad and bias is not None and bias.requires_grad,
            sinks=options.sinks is not None,
            dropout=options.dropout,
            needs_grad=grad and any(x.requires_grad for x in (q, k, v, *options.terms.values())),
            lse=lse,
        )


_FULL = Band()


def _capability(device: torch.device) -> tuple[int, int]:
    """The compute capability, by the one of PyTorch's functions for it that can be traced."""
    if not torch.compiler.is_compiling():
        return _known_capability(device)
    properties = torch.cuda.get_device_properties(device)
    return properties.major, properties.minor


@cache
def _known_capability(device: torch.device) -> tuple[int, int]:
    """The same, asked for once: PyTorch's functions take as long as all else that is asked."""
    return torch.cuda.get_device_capability(device)


def _mixed(q: Tensor, x: Tensor) -> bool:
    """Whether two tensors differ in device or, after autocast, in dtype."""
    if x.device != q.device:
        return True
    return x.dtype != q.dtype and computing_dtype(x) != computing_dtype(q)


def _aligned(x: Tensor) -> bool:
    """Whether every row starts at a multiple of 16 bytes, as far as its strides tell."""
    batch, head, row, last = x.stride()
    n = x.element_size()
    return last == 1 and not (row * n % 16 or head * n % 16 or batch * n % 16)


def device_type(x: Tensor) -> str:
    """The type of a tensor's device; on a card, without the time that its name takes to make."""
    return "cuda" if x.is_cuda else x.device.type


def computing_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which autocast, if it is on, wants an operand of a product."""
    device = device_type(x)
    if torch.is_autocast_enabled(device) and x.is_floating_point() and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


Row = tuple[Reason, Callable[[Call], bool]]


@dataclass(frozen=True)
class Engine:
    """One way of computing attention.

    Attributes:
        requirements: Rows (reason, predicate). The engine can serve a call that meets them all.
        preferences: Rows of the same kind. One that is not met says that another engine, if there
            is one, is the better choice.
    """

    name: str
    requirements: tuple[Row, ...] = ()
    preferences: tuple[Row, ...] = ()


HALF = (torch.float16, torch.bfloat16)
FLOATS = (*HALF, torch.float32, torch.float64)


def _interpreted(call: Call) -> bool:
    """Whether Triton's interpreter is asked for, which computes on the CPU, for tests."""
    return call.device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"


# How far the kernels of `triton.slopes` count.
MOST_DISTANT = 1 << 23
EXACT = f"exactly up to {MOST_DISTANT:,}"


def _slopes_exact(call: Call) -> bool:
    """Whether all distances, where slopes need them, are within what kernels tell exactly."""
    return not call.slopes or max(call.n_queries, call.n_keys) <= MOST_DISTANT


def _small(call: Call, scores: int) -> bool:
    """Whether the matrix of scores of a head is so small that its memory does not matter."""
    return call.device == "cpu" and call.n_queries * call.n_keys <= scores


def key_range(band: Band, n_keys: int) -> tuple[int, int]:
    """The keys start..stop that the first query sees."""
    start = 0 if band.left is None else max(0, band.offset - band.left)
    stop = n_keys if band.right is None else min(n_keys, band.offset + band.right + 1)
    return start, stop


def _sdpa_mask(call: Call) -> bool:
    """Whether PyTorch takes the mask as it is, or as one row of keys."""
    if call.band is None:
        return call.mask is Boolean or call.one_row
    if call.n_queries == 1:
        start, stop = key_range(call.band, call.n_keys)
        return start < stop
    square_causal = call.band == Band(right=0) and call.n_queries == call.n_keys
    return call.band == Band() or (square_causal and not (call.bias or call.table or call.slopes))


def _sdpa_bias(call: Call) -> bool:
    """Whether mask and bias are one tensor that is no larger than the bias."""
    if not call.bias:
        return True
    if call.device == "cuda":
        return not call.bias_one_row or call.one_row
    # Where the bias has a gradient, PyTorch's attention is not fused on a CPU.
    return not call.bias_grad and (call.band == Band() or (call.one_row and call.bias_one_row))


def _sdpa_sizes(call: Call) -> bool:
    """Whether PyTorch keeps a fused kernel for these head sizes."""
    if call.device == "cuda":
        return call.head_size % 8 == 0 and call.value_size % 8 == 0
    return call.head_size == call.value_size


def _sdpa_applies(call: Call) -> bool:
    return why_not(SDPA, call) is None


COMMON: tuple[Row, ...] = (
    (Reason("MIXED", "q, k and v differ in dtype or device"), lambda c: not c.mixed),
    (
        Reason("DTYPE", "the dtype is none of float16, bfloat16, float32, float64"),
        lambda c: c.dtype in FLOATS,
    ),
    (
        Reason("HEADS", "the query heads are not a multiple of the key heads"),
        lambda c: c.heads % c.kv_heads == 0 if c.kv_heads else c.heads == 0,
    ),
)

HOPPER = Engine(
    "hopper",
    requirements=(
        (Reason("HOPPER_GLUON", "Triton 3.6 or newer is not installed"), lambda _: GLUON_INSTALLED),
        (
            Reason("HOPPER_DEVICE", "the Hopper kernels need an NVIDIA card of capability 9.0"),
            lambda c: c.device == "cuda" and c.capability == (9, 0) and not torch.version.hip,
        ),
        (
            Reason("HOPPER_DTYPE", "the Hopper kernels take float16 and bfloat16"),
            lambda c: c.dtype in HALF,
        ),
        (
            Reason("HOPPER_HEAD_SIZE", "the Hopper kernels have no tiles for these head sizes"),
            lambda c: tuning.crew("forward", c.head_size, c.value_size) is not None,
        ),
        (
            Reason("HOPPER_ALIGNMENT", "the Hopper kernels read rows at multiples of 16 bytes"),
            lambda c: c.aligned,
        ),
        (
            Reason("HOPPER_MASK", "the Hopper kernels read no boolean masks"),
            lambda c: c.mask is not Boolean,
        ),
        (
            Reason("HOPPER_BIAS", "the Hopper kernels add no biases of pairs"),
            lambda c: not c.relative and (c.bias_one_row or not c.bias),
        ),
        (
            Reason("HOPPER_SLOPES", f"the Hopper kernels tell distances of slopes {EXACT}"),
            _slopes_exact,
        ),
        (
            Reason("HOPPER_SCORE", "the Hopper kernels run no functions on scores"),
            lambda c: not c.score,
        ),
        (
            Reason("HOPPER_DROPOUT", "the Hopper kernels drop no weights"),
            lambda c: not c.dropout,
        ),
    ),
    preferences=(
        (
            Reason("HOPPER_SHORT", "the Hopper kernels are for more than 256 queries"),
            lambda c: c.n_queries > 256,
        ),
        (
            # The host makes more launches for it: T5's at 1,536 tokens took 0.73 ms, not 0.55.
            Reason(
                "HOPPER_TABLE",
                "with a table's gradient the Hopper kernels are for more than 1,536 queries",
            ),
            lambda c: not c.table_grad or c.n_queries > 1536,
        ),
    ),
)

TRITON = Engine(
    "triton",
    requirements=(
        (Reason("TRITON_MISSING", "Triton is not installed"), lambda _: TRITON_INSTALLED),
        (
            Reason("TRITON_DEVICE", "the Triton kernels need a CUDA device"),
            lambda c: c.device == "cuda" or _interpreted(c),
        ),
        (
            Reason("TRITON_DTYPE", "the Triton kernels take float16, bfloat16 and float32"),
            lambda c: c.dtype != torch.float64,
        ),
        (
            Reason("TRITON_BFLOAT16", "bfloat16 needs compute capability 8.0"),
            lambda c: c.dtype != torch.bfloat16 or (c.capability or (8, 0)) >= (8, 0),
        ),
        (
            Reason("TRITON_HEAD_SIZE", "the Triton kernels take head sizes up to 512"),
            lambda c: max(c.head_size, c.value_size) <= 512,
        ),
        (
            Reason("TRITON_SLOPES", f"the Triton kernels tell distances of slopes {EXACT}"),
            _slopes_exact,
        ),
    ),
    preferences=(
        (
            Reason("TRITON_INTERPRETER", "Triton's interpreter is for tests"),
            lambda c: c.device == "cuda",
        ),
        (
            Reason("TRITON_FLOAT32", "PyTorch's attention is faster in float32"),
            lambda c: c.dtype != torch.float32 or not _sdpa_applies(c),
        ),
        (
            Reason("TRITON_DROPOUT", "PyTorch's attention drops weights faster"),
            lambda c: not c.dropout or not _sdpa_applies(c),
        ),
        (
            Reason("TRITON_ONE_QUERY", "PyTorch's attention shares one query's keys out"),
            lambda c: c.n_queries > 1 or not _sdpa_applies(c),
        ),
    ),
)

SDPA = Engine(
    "sdpa",
    requirements=(
        (Reason("SDPA_LSE", "PyTorch's attention does not return the lse"), lambda c: not c.lse),
        (Reason("SDPA_SOFTCAP", "PyTorch's attention has no softcap"), lambda c: not c.softcap),
        (
            Reason("SDPA_RELATIVE", "PyTorch's attention takes no vectors by distance"),
            lambda c: not c.relative,
        ),
        (
            Reason("SDPA_SCORE", "PyTorch's attention runs no Triton function"),
            lambda c: not c.score,
        ),
        (Reason("SDPA_SINKS", "PyTorch's attention takes no sinks"), lambda c: not c.sinks),
        (
            Reason("SDPA_DTYPE", "PyTorch's attention is not fused in float64 on a CUDA device"),
            lambda c: c.device != "cuda" or c.dtype != torch.float64,
        ),
        (
            Reason("SDPA_HEAD_SIZE", "PyTorch's attention is not fused for these head sizes"),
            lambda c: _sdpa_sizes(c) or _small(c, SMALL_BIAS),
        ),
        (
            Reason("SDPA_TABLE", "PyTorch's attention would expand the table to N x M"),
            lambda c: not (c.table or c.slopes) or c.n_queries == 1 or _small(c, SMALL_BIAS),
        ),
        (
            Reason("SDPA_MASK", "PyTorch's attention would expand the mask to N x M"),
            lambda c: _sdpa_mask(c) or _small(c, SMALL_MASK),
        ),
        (
            Reason("SDPA_BIAS", "PyTorch's attention would expand the bias to N x M"),
            lambda c: _sdpa_bias(c) or _small(c, SMALL_BIAS),
        ),
        (
            Reason("SDPA_DROPOUT", "PyTorch's attention with dropout is not fused here"),
            lambda c: not c.dropout or c.device == "cuda" or _small(c, SMALL_BIAS),
        ),
    ),
)

SCORE = Reason("TILED_SCORE", "a Triton function on scores runs on the Triton engine only")
TILED = Engine(
    "tiled",
    requirements=((SCORE, lambda c: not c.score),),
    preferences=(
        (
            Reason("TILED_CUDA", "a CUDA device has faster engines"),
            lambda c: c.device != "cuda",
        ),
    ),
)

# In order of preference. `reference` is not among them: it is run only when asked for by name.
ENGINES = (HOPPER, TRITON, SDPA, TILED)
REFERENCE = Engine("reference", requirements=((SCORE, lambda c: not c.score),))


def why_not(engine: Engine, call: Call) -> Reason | None:
    """The first requirement of the engine that the call does not meet; None if it can serve it."""
    return _first_unmet((*COMMON, *engine.requirements), call)


def choose(call: Call) -> Engine:
    """The first engine that can serve the call and is the better choice, or else that can.

    Raises:
        ValueError: No engine can; the message has the reason.
    """
    able = None
    for engine in ENGINES:
        if why_not(engine, call) is None:
            if _first_unmet(engine.preferences, call) is None:
                return engine
            able = able or engine
    if able is None:
        raise ValueError(f"no engine takes this call: {why_not(TILED, call)}")
    return able


def _first_unmet(rows: tuple[Row, ...], call: Call) -> Reason | None:
    for reason, met in rows:
        if not met(call):
            return reason
    return None
