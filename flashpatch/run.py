"""Runs an unchanged script with every transformers model that it builds patched.

    accelerate launch -m flashpatch.run train.py --lr 1e-4
    torchrun --nproc-per-node 8 -m flashpatch.run train.py --lr 1e-4
    python -m flashpatch.run -m package.module --lr 1e-4

To the script all is as without it: `sys.argv`, `__main__`, `sys.path`, tracebacks, exit codes, and
nothing of torch or transformers is imported before the script does so. Processes that the script
itself spawns start without flashpatch.
"""

import atexit
import builtins
import io
import logging
import os
import pkgutil
import runpy
import sys
from importlib.machinery import SourceFileLoader
from itertools import dropwhile
from pathlib import Path
from types import FrameType, ModuleType, TracebackType
from typing import Any, NoReturn

from flashpatch import enabling

USAGE = (
    "flashpatch.run runs a script with every transformers model patched: "
    "{python,torchrun,accelerate launch} -m flashpatch.run [-m] SCRIPT_OR_MODULE [ARGUMENT ...]"
)

_LOG = logging.getLogger("flashpatch.run")


def main() -> None:
    """Runs the script or module that `sys.argv` names, in the place of this one."""
    arguments = sys.argv[1:]
    is_module = arguments[:1] == ["-m"]
    target, *rest = arguments[is_module:] or [""]
    if target in ("-h", "--help"):
        sys.stdout.write(USAGE + "\n")
        return
    if not target or target.startswith("-"):
        _refuse(USAGE)
    narrator = _Narrator()
    if _is_main_rank():
        _log_to_stderr()
        atexit.register(narrator.sum_up)
        enabling.enable(on_apply=narrator.tell)
    else:
        enabling.enable(on_fallback=ignore)
    try:
        if is_module:
            _run_module(target, rest)
        else:
            _run_script(target, rest)
    except BaseException as error:
        if not isinstance(error, SystemExit):
            _leave_no_trace()
        if not isinstance(error, SystemExit) or error.code:
            atexit.unregister(narrator.sum_up)
        raise


def ignore(_reason: object) -> None:
    """The `on_fallback` of all ranks but the main one."""


class _Narrator:
    """Tells what was patched, model by model, and at the end if nothing was."""

    def __init__(self) -> None:
        self.built = 0
        self.served = 0

    def tell(self, model: Any, report: Any) -> None:
        self.built += 1
        self.served += report.served
        _LOG.info("%s: %s", enabling.title(model), report)

    def sum_up(self) -> None:
        if not self.built:
            _LOG.info("flashpatch patched nothing: the script built no transformers model")
        elif not self.served:
            _LOG.info("flashpatch patched nothing: none of the models has attention it can serve")


def _is_main_rank() -> bool:
    rank = os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or "0"
    return rank == "0"


def _log_to_stderr() -> None:
    """Gives the reports their own way out, whatever the script does with logging."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    _LOG.addHandler(handler)
    _LOG.setLevel(logging.INFO)
    _LOG.propagate = False


def _refuse(message: str) -> NoReturn:
    sys.stderr.write(message + "\n")
    sys.exit(2)


def _run_module(name: str, arguments: list[str]) -> None:
    """What `python -m name` does."""
    sys.argv[:] = ["-m", *arguments]
    _new_main()
    _as_main(name)


def _run_script(script: str, arguments: list[str]) -> None:
    """What `python script` does, for a file, or a folder or archive with a `__main__.py`."""
    sys.argv[:] = [script, *arguments]
    # as Python writes it into `__file__`: absolute, but neither resolved nor normalised
    path = script if Path(script).is_absolute() else f"{Path.cwd()}{os.sep}{script}"
    main = _new_main()
    if pkgutil.get_importer(path) is not None:
        _first_on_path(path)
        _as_main("__main__", alter_argv=False)
        return
    try:
        with io.open_code(path) as file:
            source = file.read()
    except OSError as error:
        problem = f"[Errno {error.errno}] {error.strerror}"
        _refuse(f"{sys.executable}: can't open file {path!r}: {problem}")
    _first_on_path(str(Path(path).resolve().parent))
    main.__file__ = path
    main.__loader__ = SourceFileLoader("__main__", path)
    exec(compile(source, path, "exec", dont_inherit=True), vars(main))


def _new_main() -> ModuleType:
    """An empty `__main__`, as Python makes it before it runs a script."""
    main = ModuleType("__main__")
    vars(main).update(__annotations__={}, __builtins__=builtins, __cached__=None)
    sys.modules["__main__"] = main
    return main


def _as_main(name: str, *, alter_argv: bool = True) -> None:
    """The function that Python itself calls for `-m`, for folders and for archives."""
    runpy._run_module_as_main(name, alter_argv)  # type: ignore[attr-defined]


def _first_on_path(folder: str) -> None:
    """Puts the script's folder where `-m` has put the current one."""
    safe = sys.flags.isolated or getattr(sys.flags, "safe_path", False)
    if not safe:
        sys.path[0] = folder


def _leave_no_trace() -> None:
    """Lets the interpreter report the exception that is on its way without our frames."""
    hook = sys.excepthook

    def report(kind: type[BaseException], error: BaseException, _: TracebackType | None) -> None:
        error.__traceback__ = _without_launcher(error.__traceback__)
        _hide_constructors(error, set())
        hook(kind, error, error.__traceback__)

    sys.excepthook = report


def _without_launcher(traceback: TracebackType | None) -> TracebackType | None:
    """The traceback below this file's frames."""
    before = dropwhile(lambda entry: not _is_ours(entry.tb_frame, __file__), _entries(traceback))
    return next(dropwhile(lambda entry: _is_ours(entry.tb_frame, __file__), before), None)


def _hide_constructors(error: BaseException | None, seen: set[int]) -> None:
    """Takes the frames that wrap constructors out of an exception and those it is chained to."""
    if error is None or id(error) in seen:
        return
    seen.add(id(error))
    kept = None
    for entry in reversed(_entries(error.__traceback__)):
        if not _is_ours(entry.tb_frame, enabling.__file__):
            kept = TracebackType(kept, entry.tb_frame, entry.tb_lasti, entry.tb_lineno)
    error.__traceback__ = kept
    for other in (error.__cause__, error.__context__, *getattr(error, "exceptions", ())):
        _hide_constructors(other, seen)


def _entries(traceback: TracebackType | None) -> list[TracebackType]:
    entries = []
    while traceback is not None:
        entries.append(traceback)
        traceback = traceback.tb_next
    return entries


def _is_ours(frame: FrameType, file: str) -> bool:
    return frame.f_code.co_filename == file


if __name__ == "__main__":
    # under its own name, because models keep `ignore` and the script takes `__main__`
    from flashpatch.run import main as run

    run()
