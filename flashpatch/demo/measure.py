"""One step in a fresh process, its time and its peak memory.

Separate because memory is honest only in a process of its own: what an earlier step left in the
allocator's pools, a later one does not have to ask for.
"""

import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import (
    forkserver,
    get_all_start_methods,
    get_context,
    set_forkserver_preload,
)
from pathlib import Path
from time import perf_counter
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


# forkserver starts each process from one that has imported all, but computed nothing
_START = "forkserver" if "forkserver" in get_all_start_methods() else "spawn"


def prepare(module: str) -> None:
    """Starts to import a module for the fresh processes to come, beside what runs here."""
    if _START == "forkserver":
        set_forkserver_preload([module])
        forkserver.ensure_running()


def in_fresh_process(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """`function(*args, **kwargs)`, in a new process that has computed nothing before.

    Raises:
        BrokenProcessPool: The process was killed, as by a system that ran out of memory.
    """
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context(_START)) as pool:
        return pool.submit(function, *args, **kwargs).result()


def measured(step: Callable[[], T], device: torch.device) -> tuple[T, float, int]:
    """What `step` returned, its seconds, and the bytes its peak lay above the start."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    else:
        _forget_peak()
        before = _resident_bytes("VmRSS")
    start = perf_counter()
    result = step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = perf_counter() - start
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    else:
        peak = _resident_bytes("VmHWM")
    return result, seconds, peak - before


def _forget_peak() -> None:
    """Makes Linux count the process's peak from now on, where it lets us."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        # the peak so far was building the model, far below that of a step
        return


def _resident_bytes(field: str) -> int:
    """This process's resident memory: VmRSS now, VmHWM at its peak.

    Not getrusage where it can be avoided: on Linux its ru_maxrss starts at the peak of the process
    that started this one.
    """
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
        raise RuntimeError(f"/proc/self/status has no {field}")
    import psutil

    memory = psutil.Process().memory_info()
    if field == "VmRSS":
        return memory.rss
    if sys.platform == "win32":
        return memory.peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
