"""What the kernels' tests share: random calls, and plain PyTorch's answer to them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hopper_calls import DEVICE, TOGETHER, attend, own_kernels, spread
from torch import Tensor

from flashpatch_kernels import reference
from flashpatch_kernels.dropout import keep, keep_probability
from flashpatch_kernels.masks import (
    Band,
    Boolean,
    Intervals,
    Mask,
    allowed,
    documents,
    intersect,
    key_mask,
)
from flashpatch_kernels.options import Options, Relative


def _keys(m: int) -> Intervals:
    """Two batch rows: one padded on the left, one on the right and with a hole."""
    visible = torch.ones(2, m, dtype=torch.bool)
    visible[0, : m // 3] = False
    visible[1, m - m // 4 :] = False
    visible[1, 2:5] = False
    return key_mask(visible)


def _documents(n: int, m: int) -> Mask:
    ids = torch.arange(m).ge(m // 3).int() + torch.arange(m).ge(m // 2 + 1).int()
    return Intervals(documents(ids[None]).bounds[:, torch.arange(n) * m // n])


def _intervals() -> Callable[[int, int], Intervals]:
    def make(n: int, m: int) -> Intervals:
        generator = torch.Generator().manual_seed(0)
        lo = torch.randint(0, m, (2, n), generator=generator)
        hi = torch.randint(0, m + 1, (2, n), generator=generator)  # half of them see nothing
        return Intervals(torch.stack((lo, hi), dim=-1).int())

    return make


def _boolean(heads: int, n_one: bool = False) -> Callable[[int, int], Boolean]:
    def make(n: int, m: int) -> Boolean:
        generator = torch.Generator().manual_seed(0)
        seen = torch.rand(2, heads, 1 if n_one else n, m, generator=generator) > 0.6
        seen[0, :, n // 2 :] = False
        seen[1, ..., : m // 2] = False
        return Boolean(seen)

    return make


# Each from the numbers of queries and keys, for a batch of 2 with 4 heads.
MASKS: dict[str, Callable[[int, int], Mask]] = {
    "full": lambda n, m: Band(),
    "causal": lambda n, m: Band(right=0, offset=m - n),
    "causal from the first key": lambda n, m: Band(right=0),
    "causal window": lambda n, m: Band(left=4, right=0, offset=m - n),
    "window": lambda n, m: Band(left=6, right=6, offset=m - n),
    "future only": lambda n, m: Band(left=-1),
    "keys": lambda n, m: _keys(m),
    "causal keys": lambda n, m: intersect(Band(right=0, offset=m - n), _keys(m), n, m, "cpu"),
    "documents": _documents,
    "intervals": _intervals(),
    "boolean": _boolean(1),
    "boolean per head": _boolean(4),
    "boolean keys": _boolean(1, n_one=True),
}


@dataclass(frozen=True)
class Sample:
    """A call with everything that is needed to differentiate it."""

    q: Tensor
    k: Tensor
    v: Tensor
    options: Options
    dout: Tensor
    dlse: Tensor

    @property
    def inputs(self) -> dict[str, Tensor]:
        """The tensors that are differentiable."""
        return {"q": self.q, "k": self.k, "v": self.v} | self.options.terms

    def to(self, dtype: torch.dtype) -> "Sample":
        """The same numbers in another dtype, as leaves."""

        cast = {name: x.detach().to(dtype).requires_grad_() for name, x in self.inputs.items()}
        return replace(self.with_inputs(cast), dout=self.dout.to(dtype))

    def with_inputs(self, inputs: Mapping[str, Tensor]) -> "Sample":
        """The same call of other tensors, by the names of `inputs`."""
        options = self.options.with_terms({name: inputs[name] for name in self.options.terms})
        return replace(self, q=inputs["q"], k=inputs["k"], v=inputs["v"], options=options)

    def on(self, device: str) -> "Sample":
        """The same call on another device, as leaves."""

        def moved(x: object) -> object:
            if isinstance(x, Tensor):
                return x.detach().to(device).requires_grad_(x.requires_grad)
            if isinstance(x, (Options, Intervals, Boolean, Relative)):
                return replace(x, **{name: moved(value) for name, value in vars(x).items()})
            return x

        return replace(self, **{name: moved(value) for name, value in vars(self).items()})

    def answer(self, attend: Callable[..., tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """Output, lse and gradients under `attend(q, k, v, options)`."""
        out, lse = attend(self.q, self.k, self.v, self.options)
        seen = lse.detach() > -torch.inf
        loss = (out.double() * self.dout.double()).sum()
        loss = loss + (torch.where(seen, lse, 0).double() * self.dlse).sum()
        grads = torch.autograd.grad(loss, tuple(self.inputs.values()))
        return {"out": out, "lse": lse} | dict(zip(self.inputs, grads, strict=True))


def _sample(
    mask: str = "full",
    *,
    dtype: torch.dtype = torch.float32,
    kv_heads: int = 4,
    n: int = 37,
    m: int = 45,
    d: int = 8,
    dv: int | None = None,
    terms: tuple[str, ...] = (),
    bias_shape: tuple[int, int, int] = (1, 4, 1),
    dropout: float = 0.0,
    entries: int = 12,
    first: int = -5,
    embedding_heads: int = 4,
    embedding_size: int | None = None,
) -> Sample:
    """A random call: batch 2, 4 query heads, views of memory that a projection lays out.

    Args:
        terms: "softcap", the names of `Options`, and "clamped table", which has `entries` distances
            from `first` on, as the vectors by distance have.
        embedding_heads: Heads of the vectors by distance, 4 or 1.
        embedding_size: Elements of those of queries and keys; None is `d`.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    dv = d if dv is None else dv
    term_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    options = Options(
        mask=MASKS[mask](n, m),
        scale=0.7,
        softcap=2.0 if "softcap" in terms else None,
        table=random(4, n + m - 1, dtype=term_dtype) if "table" in terms else None,
        bias=random(*bias_shape, m) if "bias" in terms else None,
        sinks=random(4, dtype=term_dtype) if "sinks" in terms else None,
        dropout=dropout,
        seed=torch.tensor([1234567890123]) if dropout else None,
    )
    tensors = Sample(
        q=random(2, n, 4, d).transpose(1, 2),
        k=random(2, m, kv_heads, d).transpose(1, 2),
        v=random(2, m, kv_heads, dv).transpose(1, 2),
        options=options,
        dout=random(2, n, 4, dv).transpose(1, 2),
        dlse=random(2, 4, n, dtype=torch.float32),
    )
    # Drawn last, so that a term changes none of the tensors of the calls that are without it.
    more: dict[str, object] = {}
    if "slopes" in terms:
        more["slopes"] = random(4, dtype=term_dtype) * 0.2
    if "clamped table" in terms:
        more |= {"table": random(4, entries, dtype=term_dtype), "first": first}
    for name, length in (("relative_queries", n), ("relative_keys", m), ("relative_values", None)):
        if name in terms:
            e = dv if length is None else embedding_size or d
            embeddings = random(embedding_heads, entries, e) * 0.5
            vectors = None if length is None else random(2, length, 4, e).transpose(1, 2)
            more[name] = Relative(embeddings, first, vectors)
    sample = replace(tensors, options=replace(options, **more))
    for x in sample.inputs.values():
        x.requires_grad_()
    return sample


def _pytorch(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Attention as a user would write it, in q's dtype."""
    n, m, groups = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    s = q @ k.transpose(-1, -2) * options.scale
    if options.softcap is not None:
        s = options.softcap * torch.tanh(s / options.softcap)
    if options.table is not None:
        first = 1 - n if options.first is None else options.first
        at = reference.distances(n, m, first, options.table.shape[1], q.device)
        s = s + options.table.to(q.dtype)[:, at]
    if options.slopes is not None:
        away = reference.distances(n, m, m - n, None, q.device).abs()
        s = s - options.slopes.to(q.dtype)[:, None, None] * away
    if options.bias is not None:
        s = s + options.bias
    if options.relative_queries is not None:
        x, w = _by_pair(options.relative_queries, q, m)
        s = s + torch.einsum("bhie,hije->bhij", x, w)
    if options.relative_keys is not None:
        y, u = _by_pair(options.relative_keys, q, m)
        s = s + torch.einsum("bhje,hije->bhij", y, u)
    seen = allowed(options.mask, n, m, q.device)
    s = s.masked_fill(~seen, -torch.inf)
    if options.sinks is not None:
        sinks = options.sinks.to(q.dtype)[:, None, None].expand(*s.shape[:3], 1)
        s = torch.cat((s, sinks), dim=-1)
    dead = (s == -torch.inf).all(-1, keepdim=True)
    s = s.masked_fill(dead, 0)
    lse = torch.logsumexp(s.float() if q.dtype != torch.float64 else s, dim=-1)
    lse = lse.masked_fill(dead[..., 0], -torch.inf)
    p = torch.softmax(s, dim=-1).masked_fill(dead, 0)[..., :m]
    if options.dropout:
        kept = keep(options.seed, options.dropout, *q.shape[:3], m)
        p = p * kept / keep_probability(options.dropout)
    out = p @ v
    if options.relative_values is not None:
        _, z = _by_pair(options.relative_values, q, m)
        out = out + torch.einsum("bhij,hije->bhie", p.to(q.dtype), z)
    return out, lse


def _by_pair(relative: Relative, q: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """The vectors, and the embeddings of all pairs, [H, N, M, E]."""
    at = reference.distances(q.shape[2], m, relative.first, relative.embeddings.shape[1], q.device)
    vectors = relative.embeddings if relative.vectors is None else relative.vectors
    pairs = relative.embeddings.to(q.dtype)[:, at].expand(q.shape[1], -1, -1, -1)
    return vectors.to(q.dtype), pairs


@pytest.fixture(autouse=True)
def small_tensors(one_thread: None) -> None:
    """All calls here are."""


@pytest.fixture(scope="session")
def score_functions() -> ModuleType:
    """What `score_functions.py` defines."""
    pytest.importorskip("triton", reason="Triton is not installed")
    file = Path(__file__).with_name("score_functions.py")
    spec = spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=MASKS)
def mask_name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[name for name in MASKS if not name.startswith("boolean")])
def range_mask_name(request: pytest.FixtureRequest) -> str:
    """The masks that are no matrices: every query sees a range of keys."""
    return request.param


@pytest.fixture(scope="session")
def sample() -> Callable[..., Sample]:
    return _sample


@pytest.fixture(scope="session")
def pytorch() -> Callable[..., tuple[Tensor, Tensor]]:
    return _pytorch


@pytest.fixture(scope="session")
def check(assert_as_exact_as_pytorch: Callable[..., None]) -> Callable[..., None]:
    """Judges an engine's output, lse and gradients by the rule of tolerance."""

    def check(sample: Sample, attend: Callable[..., tuple[Tensor, Tensor]]) -> None:
        exact = sample.to(torch.float64).answer(reference.attention)
        theirs, ours = sample.answer(_pytorch), sample.answer(attend)
        for name in exact:
            assert_as_exact_as_pytorch(ours[name], theirs[name], exact[name], name)

    return check


# Reads calls, one a line; writes what each of their kernels needs.
RESOURCES = """
import json, sys
import torch
import triton_resources
for line in sys.stdin:
    call = json.loads(line)
    dtype = getattr(torch, call.pop("dtype"))
    torch.set_float32_matmul_precision(call.pop("precision", "highest"))
    for launch in triton_resources.record("sm90", dtype, **call):
        found = triton_resources.resources(triton_resources.compile_launch(launch))
        print(json.dumps([line, launch.kernel.__name__, found._asdict()]), flush=True)
"""


def _compiling(code: str, **options: Any) -> subprocess.Popen[str]:
    """A process in which Triton compiles, with what the tests and the benchmarks define.

    Its own, because the interpreter's tests may have asked for Python functions, not kernels.
    """
    tests = Path(__file__).parent
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    folders = [str(tests.parents[1] / "benchmarks"), str(tests), *sys.path]
    environment["PYTHONPATH"] = os.pathsep.join(folders)
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, **options)


@pytest.fixture(scope="session")
def compiling() -> Callable[..., subprocess.Popen[str]]:
    return _compiling


@pytest.fixture(scope="session")
def kernels_of() -> Callable[[list[dict[str, Any]]], dict[str, list[tuple[str, dict[str, Any]]]]]:
    """Calls -> by call, in JSON, its kernels and what each needs of a Hopper card."""

    def kernels_of(calls: list[dict[str, Any]]) -> dict[str, list[tuple[str, dict[str, Any]]]]:
        workers = [_compiling(RESOURCES, stdin=subprocess.PIPE) for _ in range(2)]
        for at, worker in enumerate(workers):
            assert worker.stdin is not None
            worker.stdin.writelines(json.dumps(call) + "\n" for call in calls[at::2])
            worker.stdin.flush()
        found: dict[str, list[tuple[str, dict[str, Any]]]] = {}
        for worker in workers:
            answer, _ = worker.communicate()
            assert worker.returncode == 0
            for call, kernel, resources in map(json.loads, answer.splitlines()):
                found.setdefault(call.strip(), []).append((kernel, resources))
        return found

    return kernels_of


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Triton's, whose current device and stream are numbers."""
    import triton

    driver = SimpleNamespace(get_current_device=lambda: 3, get_current_stream=lambda _: 7)
    monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=driver))
    return driver


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch, driver: SimpleNamespace) -> Iterator[list[Any]]:
    """What was launched, in order: `written_launches.Launched`."""
    from written_launches import Compiled, Flat, Launched

    from flashpatch_kernels.triton import launching, plans

    made: list[Any] = []

    def launch(_kernel: Any, n_programs: int, _tile: Any, *arguments: Any) -> Compiled:
        made.append(Launched(False, (n_programs, *arguments)))
        return Compiled(Flat(relaunch))

    def relaunch(n_programs: int, *rest: Any) -> None:
        made.append(Launched(True, (n_programs, *rest[12:])))

    monkeypatch.setattr(launching, "launch", launch)
    plans.forget()
    yield made
    plans.forget()


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


# Of the Hopper engine on a card, for the tests that import `hopper_calls`.


@pytest.fixture
def hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):  # for no other are these kernels chosen
        pytest.skip("not a Hopper card")


@pytest.fixture
def case(sample: Callable[..., Sample]) -> Callable[..., Sample]:
    """A sample on the card, its tensors spread out; `mask` is a name or a record."""

    def case(
        mask: str | Mask = "causal",
        *,
        dtype: torch.dtype = torch.bfloat16,
        kv_heads: int = 2,
        n: int = 300,
        m: int = 333,
        d: int = 64,
        **options: Any,
    ) -> Sample:
        scale = options.pop("scale", None)
        name = mask if isinstance(mask, str) else "full"
        one = sample(name, dtype=dtype, kv_heads=kv_heads, n=n, m=m, d=d, **options).on(DEVICE)
        if name != mask:
            one = replace(one, options=replace(one.options, mask=mask))
        if scale is not None:
            one = replace(one, options=replace(one.options, scale=scale))
        return replace(one, **{x: spread(getattr(one, x)) for x in ("q", "k", "v", "dout")})

    return case


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the engine's own kernels that ran, in order."""
    from flashpatch_kernels.triton import launching, plans

    names: list[str] = []
    launch, make = launching.launch, plans.Launch.make

    def note(kernel: Any) -> None:
        if kernel in own_kernels():
            names.append(kernel.__name__)

    def spy_launch(kernel: Any, *arguments: Any) -> Any:
        note(kernel)
        return launch(kernel, *arguments)

    def spy_make(one: plans.Launch, *tensors: Any) -> None:
        note(one.compiled.src.fn)
        make(one, *tensors)

    monkeypatch.setattr(launching, "launch", spy_launch)
    monkeypatch.setattr(plans.Launch, "make", spy_make)
    plans.forget()  # of launches that nobody spies on
    yield names
    plans.forget()


@pytest.fixture
def compare(
    check: Callable[..., None], launched: list[str], poisoned_memory: None
) -> Callable[..., None]:
    """Judges all that a call and its gradient give, and that these kernels gave it."""

    def compare(one: Sample, kernels: Sequence[str] = TOGETHER) -> None:
        launched.clear()
        check(one, attend)
        assert launched == list(kernels)

    return compare
