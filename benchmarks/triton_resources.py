"""What the Triton kernels need of a card, found without one: registers, spills, shared memory.

`record` makes a call's launches without running them, `compile_launch` compiles one for a target,
and `resources` reads registers and local memory from the machine code. As a script it prints a
table: `python benchmarks/triton_resources.py 64 128 --dtype bfloat16 --engine hopper`.
"""

import argparse
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from flashpatch_kernels import tuning
from flashpatch_kernels.hopper import crews as hopper_crews
from flashpatch_kernels.masks import Band, Boolean, Intervals, Mask
from flashpatch_kernels.options import Options, Relative, Score
from flashpatch_kernels.triton import launching, setups
from flashpatch_kernels.tuning import Crew, Tile

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.int8: "i8",
    torch.uint8: "u8",
}


class Launch(NamedTuple):
    """One launch that was not made."""

    kernel: Any
    n_programs: int
    tile: Tile
    arguments: tuple[Any, ...]


class Resources(NamedTuple):
    """What a compiled kernel needs.

    Attributes:
        registers: Per thread.
        local_bytes: Local memory per thread: what did not fit in registers.
        hot_spills: Loads and stores of local memory within the loops over tiles that are wholly
            seen, where they would cost time; of a Gluon kernel within all loops with products.
        shared_bytes: Per program.
        mma: Tensor core instructions.
        serialized: Whether the assembler lets a Gluon kernel wait for each of its products.
        overwritten: Whether a loop writes registers that hold an operand of its products, loaded
            before it: a mistake of the assembler's, which no other test sees everywhere.
        released: Whether it waits until what it has written is seen by all multiprocessors.
    """

    registers: int
    local_bytes: int
    hot_spills: int
    shared_bytes: int
    mma: int
    serialized: bool
    overwritten: bool
    released: bool


# Functions of scores as users write them.
@triton.jit
def add_tanh(s, i, j, batch, head, arguments):
    """Adds a * tanh((j - i) / b)."""
    a = tl.load(arguments[0] + head)
    b = tl.load(arguments[1] + head)
    return s + a * (2 * tl.sigmoid(2 * (j - i) / b) - 1)


@triton.jit
def cap_heads(s, i, j, batch, head, arguments):
    """The soft cap of each head."""
    most = tl.load(arguments[0] + head)
    return most * (2 * tl.sigmoid(2 * s / most) - 1)


@triton.jit
def cap_heads_derivative(s, i, j, batch, head, arguments, ds):
    """Its derivative."""
    t = 2 * tl.sigmoid(2 * s / tl.load(arguments[0] + head)) - 1
    return ds * (1 - t * t)


def masks(n: int, device: str = "meta") -> dict[str, Mask]:
    """One mask for every variant of the kernels."""
    bounds = torch.empty(2, n, 2, dtype=torch.int32, device=device)
    runs = torch.empty(2, n, dtype=torch.int32, device=device)
    allowed = torch.empty(2, 1, n, n, dtype=torch.bool, device=device)
    return {
        "band": Band(),
        "causal": Band(right=0),
        "intervals": Intervals(bounds),
        "runs": Intervals(bounds, runs),
        "boolean": Boolean(allowed),
    }


def terms(heads: int, n: int, dtype: torch.dtype, size: int, dv: int) -> dict[str, dict[str, Any]]:
    """What a call may hold beside products and values: options by name."""

    def tensor(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=kind, device="meta")

    vectors = tensor(2, heads, n, size)
    relative: dict[str, dict[str, Any]] = {
        "relative queries": {"relative_queries": Relative(tensor(heads, 65, size), -32, vectors)},
        "relative keys": {"relative_keys": Relative(tensor(heads, 65, size), -32, vectors)},
        "relative values": {"relative_values": Relative(tensor(1, 65, dv), -32)},
    }
    return {
        "softcap": {"softcap": 50.0},
        "table": {"table": tensor(heads, 2 * n - 1)},
        "clamped table": {"table": tensor(heads, 257), "first": -128},
        "slopes": {"slopes": tensor(heads)},
        "bias": {"bias": tensor(1, heads, n, n)},
        "key bias": {"bias": tensor(2, heads, 1, n)},
        "sinks": {"sinks": tensor(heads)},
        "score": {"score": Score(add_tanh, None, (tensor(heads), tensor(heads)))},
        "score, derivative": {"score": Score(cap_heads, cap_heads_derivative, (tensor(heads),))},
        "dropout": {"dropout": 0.1, "seed": tensor(1, kind=torch.int64)},
        **relative,
        "relative": {name: x for term in relative.values() for name, x in term.items()},
    }


@contextmanager
def recording(
    arch: str, tiles: dict[str, Tile] | None = None, crews: dict[str, Crew] | None = None
) -> Iterator[list[Launch]]:
    """Within, launches are listed instead of made, for a card of architecture `arch`.

    `tiles` and `crews` replace the tables', by pass.
    """
    launches: list[Launch] = []
    tile_of, crew_of = tuning.tile, tuning.crew

    def tile(asked: tuning.Question, name: Any) -> Tile:
        return (tiles or {}).get(name) or tile_of(asked, name)

    def crew(name: Any, *sizes: int) -> Crew | None:
        return (crews or {}).get(name) or crew_of(name, *sizes)

    def launch(kernel: Any, n_programs: int, tile: Tile, *arguments: Any) -> None:
        launches.append(Launch(kernel, n_programs, tile, arguments))

    with (
        mock.patch.object(launching, "launch", launch),
        mock.patch.object(tuning, "architecture", return_value=arch),
        mock.patch.object(tuning, "tile", tile),
        mock.patch.object(tuning, "crew", crew),
        mock.patch.object(hopper_crews, "constants", hopper_crews.constants.__wrapped__),
        mock.patch.object(setups, "passes", setups.Passes),
    ):
        yield launches


def record(
    arch: str,
    dtype: torch.dtype,
    size: int,
    *,
    mask: str = "band",
    value_size: int | None = None,
    group: int = 1,
    aligned: bool = True,
    term: str | None = None,
    needs: tuple[str, ...] | None = None,
    passes: tuple[str, ...] = ("forward", "backward"),
    tiles: dict[str, Tile] | None = None,
    crews: dict[str, Crew] | None = None,
    engine: str = "triton",
    deterministic: bool = False,
    n: int = 1024,
) -> list[Launch]:
    """The launches of a forward and a backward of head size `size`, of all gradients by default."""
    module = import_module(f"flashpatch_kernels.{engine}")
    heads, dv = 2 * group, value_size or size
    extra = 0 if aligned else 1

    def tensor(h: int, d: int) -> torch.Tensor:
        whole = torch.empty(2, n, h, d + extra, dtype=dtype, device="meta")
        return whole[..., :d].transpose(1, 2)

    q, k, v = tensor(heads, size), tensor(2, size), tensor(2, dv)
    more = {} if term is None else terms(heads, n, dtype, size, dv)[term]
    options = Options(mask=masks(n)[mask], scale=size**-0.5, **more)
    with recording(arch, tiles, crews) as launches, algorithms(deterministic=deterministic):
        out, lse = module.forward(q, k, v, options)
        if "forward" not in passes:
            launches.clear()
        if "backward" in passes:
            names = ("q", "k", "v", *options.terms) if needs is None else needs
            module.backward(tensor(heads, dv), None, q, k, v, out, lse, options, frozenset(names))
    return launches


@contextmanager
def algorithms(*, deterministic: bool) -> Iterator[None]:
    """Within, torch asks for deterministic algorithms, or does not."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(deterministic)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def compile_launch(launch: Launch, capability: int = 90) -> Any:
    """The kernel of a launch, compiled for a compute capability."""
    kernel, _, tile, arguments = launch
    constant = {p.name for p in kernel.params if p.is_constexpr}
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}

    def kind(value: Any, path: tuple[int, ...], *, fixed: bool) -> Any:
        if fixed or value is None:
            constants[path] = value
            return "constexpr"
        if isinstance(value, tuple):
            return tuple(kind(x, (*path, at), fixed=False) for at, x in enumerate(value))
        if isinstance(value, torch.Tensor):
            if value.storage_offset() * value.element_size() % 16 == 0:
                attributes[path] = [["tt.divisibility", 16]]
            return "*" + TYPES[value.dtype]
        return "fp32" if isinstance(value, float) else "i32"

    for at, (name, value) in enumerate(zip(kernel.arg_names, arguments, strict=True)):
        signature[name] = kind(value, (at,), fixed=name in constant)
    source = source_type(kernel)(kernel, signature, constexprs=constants, attrs=attributes)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options=launching.compile_options(tile))


def source_type(kernel: Any) -> type[ASTSource]:
    """What Triton compiles a kernel as."""
    if not kernel.is_gluon():
        return ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    return GluonASTSource


def resources(compiled: Any) -> Resources:
    """Registers, local and shared memory, from the machine code."""
    is_gluon = type(compiled.src) is not ASTSource
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        usage = tool("cuobjdump", "-res-usage", binary)
        code = tool("nvdisasm", "-c", binary)
        # Asked of those kernels only that were written for it: assembling them again takes time.
        told = assembled(compiled.asm["ptx"], Path(folder)) if is_gluon else ""
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    instructions, loops = parse(code)
    hot = [loop for loop in loops if is_innermost(loop, loops)]
    busy = [loop for loop in hot if has_products(instructions[loop[0] : loop[1]])]
    # Of the loops with products the shortest is the one that tests no element. In Gluon each
    # warpgroup has its own.
    hottest = busy if is_gluon else sorted(busy, key=lambda loop: loop[1] - loop[0])[:1]
    return Resources(
        int(found[1]),
        int(found[2]),
        sum(count(instructions[start:end], ("LDL", "STL")) for start, end in hottest),
        compiled.metadata.shared,
        count(instructions, MMA),
        "wgmma.mma_async instructions are serialized" in told,
        any(overwrites(instructions, loop) for loop in busy),
        any(re.match(r"MEMBAR\S*\.GPU", instruction) for instruction in instructions),
    )


MMA = ("HGMMA", "HMMA")


def tool(name: str, *arguments: Any) -> str:
    """What a tool prints, by its path or, of those that come with Triton, its name."""
    command = [str(TOOLS / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def assembled(ptx: str, folder: Path) -> str:
    """What the assembler says of a Hopper kernel."""
    source = folder / "kernel.ptx"
    source.write_text(ptx)
    assembler = get_ptxas(90).path  # the one of several that Triton takes for Hopper
    return tool(assembler, "-arch=sm_90a", "-v", source, "-o", folder / "again.cubin")


def parse(code: str) -> tuple[list[str], list[tuple[int, int]]]:
    """The instructions, without their predicates, and the loops as ranges of them."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    loops = []
    for line in code.splitlines():
        if label := re.match(r"^(\.L_x_\d+):", line.strip()):
            labels[label[1]] = len(instructions)
        elif op := re.match(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z0-9_]+.*?);?\s*$", line):
            instructions.append(op[1])
            target = re.search(r"\.L_x_\d+", op[1])
            if name(op[1]) == "BRA" and target and target[0] in labels:
                loops.append((labels[target[0]], len(instructions)))
    return instructions, loops


def name(instruction: str) -> str:
    """What an instruction does."""
    return re.split(r"[\s.]", instruction, maxsplit=1)[0]


def overwrites(instructions: list[str], loop: tuple[int, int]) -> bool:
    """Whether a loop writes registers that its products read, and that were loaded before it."""
    start, end = loop
    written = [registers(instruction) for instruction in instructions[:end]]
    for at in range(start, end):
        operand = re.match(r"HGMMA\S* R\d+, R(\d+),", instructions[at])
        if operand is None:
            continue
        first = int(operand[1])
        for register in range(first, first + 4):
            last = next((i for i in range(at - 1, -1, -1) if register in written[i]), at)
            held = last < start and name(instructions[last]) == "LDSM"
            if held and any(register in found for found in written[at:end]):
                return True
    return False


# The only ones whose first register is not written, or whose products follow in order anyway.
READ_ONLY = ("ST", "STS", "STSM", "STG", "STL", "RED", "SYNCS", "BAR", "R2UR", "HGMMA")


def registers(instruction: str) -> range:
    """The registers that an instruction writes."""
    found = re.match(r"([A-Z0-9_.]+) (?:U?P\d+, )*R(\d+)\b", instruction)
    if found is None or name(instruction) in READ_ONLY:
        return range(0)
    kinds = found[1].split(".")
    wide = 4 if {"128", "4"} & set(kinds) else 2 if {"64", "WIDE", "CS2R"} & set(kinds) else 1
    return range(int(found[2]), int(found[2]) + wide)


def is_innermost(loop: tuple[int, int], loops: list[tuple[int, int]]) -> bool:
    """Whether no other loop lies within."""
    return not any(loop != o and loop[0] <= o[0] and o[1] <= loop[1] for o in loops)


def has_products(instructions: list[str]) -> bool:
    """Whether matrices are multiplied there, on tensor cores or without."""
    return count(instructions, MMA) > 0 or count(instructions, ("FFMA",)) > 256


def count(instructions: list[str], names: tuple[str, ...]) -> int:
    """How many of the instructions have one of the names."""
    return sum(name(instruction) in names for instruction in instructions)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sizes", type=int, nargs="+")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--mask", default="band", choices=list(masks(1)))
    parser.add_argument("--arch", default="sm90")
    parser.add_argument("--engine", default="triton", choices=["triton", "hopper"])
    parser.add_argument("--unaligned", action="store_true")
    parser.add_argument("--group", type=int, default=1)
    parser.add_argument("--term", choices=list(terms(1, 1, torch.float32, 1, 1)))
    arguments = parser.parse_args()
    print("triton", triton.__version__)
    for size in arguments.sizes:
        launches = record(
            arguments.arch,
            getattr(torch, arguments.dtype),
            size,
            mask=arguments.mask,
            aligned=not arguments.unaligned,
            group=arguments.group,
            term=arguments.term,
            engine=arguments.engine,
        )
        for launch in launches:
            start = time.perf_counter()
            capability = int(arguments.arch.removeprefix("sm"))
            found = resources(compile_launch(launch, capability))
            seconds = time.perf_counter() - start
            print(size, launch.kernel.__name__, launch.tile, found, f"{seconds:.1f} s", flush=True)


if __name__ == "__main__":
    main()
