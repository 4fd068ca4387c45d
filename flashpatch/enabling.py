"""Patches transformers models as they are built, without a call in the code that builds them.

A model is complete when its outermost constructor, or `from_pretrained`, returns: only then do all
submodules exist, and only then is it known which model is the outer one. Python offers no hook at
that point, so `enable` wraps the constructor of every `PreTrainedModel` class. Each replaced class
attribute is recorded while it is replaced; `disable` puts it back by identity.

Nothing heavy is imported here: a script that is launched with flashpatch may still set the
environment variables that torch and transformers read when they are imported.
"""

import functools
import sys
import threading
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from flashpatch.dispatch import OnFallback
    from flashpatch.patching import Patterns
    from flashpatch.report import Report

_MODELING = "transformers.modeling_utils"
_WATCHED = "_flashpatch_watched"
_MISSING: Any = object()
_LOCK = threading.RLock()


@dataclass(frozen=True)
class _Replaced:
    """A class attribute that `enable` replaced.

    That of a constructor is kept on what replaced it, so that classes can be freed while enabled.
    """

    name: str
    previous: Any  # the entry of the class's own namespace, or _MISSING
    placed: Any

    def put_back(self, owner: type) -> None:
        """Restores the attribute, unless someone else has replaced it since."""
        if vars(owner).get(self.name) is not self.placed:
            return
        if self.previous is _MISSING:
            delattr(owner, self.name)
        else:
            if isinstance(self.previous, FunctionType):
                # transformers' class decorators write the constructor's documentation
                self.previous.__doc__ = self.placed.__doc__
            setattr(owner, self.name, self.previous)


@dataclass
class _Enabled:
    """What holds between `enable` and `disable`."""

    settings: dict[str, Any] = field(default_factory=dict)
    on_apply: Callable[["nn.Module", "Report"], object] | None = None
    replaced: list[_Replaced] = field(default_factory=list)  # attributes of PreTrainedModel
    models: weakref.WeakKeyDictionary["nn.Module", None] = field(
        default_factory=weakref.WeakKeyDictionary
    )  # in the order in which they were patched


_enabled: _Enabled | None = None


class _Building(threading.local):
    """The models of the outermost construction that runs in this thread."""

    def __init__(self) -> None:
        self.depth = 0
        self.built: list[weakref.ref[nn.Module]] = []


_BUILDING = _Building()


def enable(
    models: "nn.Module | Iterable[nn.Module]" = (),
    *,
    only: "Patterns" = None,
    skip: "Patterns" = None,
    on_fallback: "OnFallback | None" = None,
    packing: str | None = None,
    on_apply: Callable[["nn.Module", "Report"], object] | None = None,
) -> list["Report"]:
    """Patches every transformers model that is built from now on, as `apply` would.

    However it is built: `from_pretrained`, `from_config`, the class itself, alone or inside a
    SentenceTransformer, a PEFT model or a class of yours. Models copied or unpickled are not built:
    they are what their originals were. Enabling again replaces the settings for what follows.

    Args:
        models: A model that exists already, or several, or modules that contain some. One that
            `apply` has patched before is left as it is.
        only: As for `apply`; names are those within each transformers model. Unlike there, a
            pattern may match nothing.
        skip: Likewise.
        on_fallback: As for `apply`; None is its default.
        packing: As for `apply`.
        on_apply: Called with each model and its report once it is patched.

    Returns:
        The reports of `models`.
    """
    global _enabled
    settings: dict[str, Any] = {"only": only, "skip": skip, "packing": packing}
    if on_fallback is not None:
        settings["on_fallback"] = on_fallback
    imported = _MODELING in sys.modules
    if imported:
        import_module(_MODELING)  # another thread may be halfway through it: wait before locking
    with _LOCK:
        first = _enabled is None
        if _enabled is None:
            _enabled = _Enabled()
        _enabled.settings, _enabled.on_apply = settings, on_apply
        if first and imported:
            _watch_models(_enabled)
        elif first:
            sys.meta_path.insert(0, _AFTER_IMPORT)
        given: Any = [models] if hasattr(models, "named_modules") else models
        return [_patch(model, _enabled) for model in _outermost(given) if _may_patch(model)]


def disable() -> None:
    """Undoes `enable`: later models are built as ever, and those it patched are reverted.

    Harmless if not enabled. A copy made of a patched model is no longer known: `revert` it.
    """
    global _enabled
    with _LOCK:
        enabled, _enabled = _enabled, None
        if _AFTER_IMPORT in sys.meta_path:
            sys.meta_path.remove(_AFTER_IMPORT)
        if enabled is None:
            return
        if enabled.replaced:
            _unwatch_models(enabled)
        for model in list(enabled.models):
            from flashpatch.patching import revert

            revert(model)


def reports() -> list[tuple["nn.Module", "Report"]]:
    """The models alive that were patched since `enable`, and what runs where in each now."""
    with _LOCK:
        models = list(_enabled.models) if _enabled is not None else []
    if not models:
        return []
    from flashpatch.patching import report_of

    return [(model, report_of(model)) for model in models]


def title(model: "nn.Module") -> str:
    """A model's class and device, as a title for its report, which holds for that device."""
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    place = f" on {', '.join(devices)}" if devices else ""
    return f"{type(model).__name__}{place}"


def _patch(model: "nn.Module", enabled: _Enabled) -> "Report":
    from flashpatch.patching import apply, matching

    settings = enabled.settings
    chosen = {name: matching(model, settings[name]) for name in ("only", "skip")}
    report = apply(model, **{**settings, **chosen})
    enabled.models[model] = None
    if enabled.on_apply is not None:
        enabled.on_apply(model, report)
    return report


def _may_patch(model: "nn.Module") -> bool:
    """Whether the model is not one that the user has patched by hand."""
    from flashpatch.patching import patched_modules

    return (_enabled is not None and model in _enabled.models) or not patched_modules(model)


def _outermost(modules: Iterable["nn.Module"]) -> list["nn.Module"]:
    """The transformers models among the modules and inside them that no other one contains."""
    if _MODELING not in sys.modules:
        return []
    from transformers import PreTrainedModel

    found = {id(m): m for top in modules for m in top.modules() if isinstance(m, PreTrainedModel)}
    inner = {id(part) for m in found.values() for part in m.modules() if part is not m}
    return [m for m in found.values() if id(m) not in inner]


def _watch_models(enabled: _Enabled) -> None:
    """Wraps what builds models in the classes that exist, and sees to those defined later."""
    from transformers.modeling_utils import PreTrainedModel

    define: classmethod[Any, Any, Any] = vars(PreTrainedModel)["__init_subclass__"]
    load: classmethod[Any, Any, Any] = vars(PreTrainedModel)["from_pretrained"]

    @functools.wraps(define.__func__)
    def init_subclass(cls: type, **kwargs: Any) -> None:
        define.__func__(cls, **kwargs)
        with _LOCK:
            if _enabled is not None:  # another thread may have disabled meanwhile
                _watch_constructor(cls)

    @functools.wraps(load.__func__)
    def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
        return _build(load.__func__, cls, *args, **kwargs)

    for name, value in (("__init_subclass__", init_subclass), ("from_pretrained", from_pretrained)):
        change = _Replaced(name, vars(PreTrainedModel)[name], classmethod(value))
        setattr(PreTrainedModel, name, change.placed)
        enabled.replaced.append(change)
    for cls in _with_subclasses(PreTrainedModel):
        _watch_constructor(cls)


def _unwatch_models(enabled: _Enabled) -> None:
    from transformers.modeling_utils import PreTrainedModel

    for change in enabled.replaced:
        change.put_back(PreTrainedModel)
    for cls in _with_subclasses(PreTrainedModel):
        change = getattr(vars(cls).get("__init__"), _WATCHED, None)
        if change is not None:
            change.put_back(cls)


def _with_subclasses(root: type) -> list[type]:
    """A class and all below it, parents before their children."""
    classes = [root]
    for cls in classes:
        classes += [child for child in cls.__subclasses__() if child not in classes]
    return classes


def _watch_constructor(cls: type) -> None:
    """Wraps the constructor of a class, own or from a mixin, unless its parents' is wrapped."""
    construct = cls.__init__
    if hasattr(construct, _WATCHED):
        return

    @functools.wraps(construct)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        _build(_construct, construct, self, *args, **kwargs)

    setattr(init, _WATCHED, _Replaced("__init__", vars(cls).get("__init__", _MISSING), init))
    cls.__init__ = init


def _construct(init: Callable[..., None], model: Any, /, *args: Any, **kwargs: Any) -> None:
    init(model, *args, **kwargs)
    _BUILDING.built.append(weakref.ref(model))


def _build(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Calls what builds models; when it is the outermost such call, patches what was built."""
    _BUILDING.depth += 1
    try:
        result = function(*args, **kwargs)
    finally:
        _BUILDING.depth -= 1
        built = _BUILDING.built
        if not _BUILDING.depth:
            _BUILDING.built = []
    if not _BUILDING.depth:
        alive = [model for reference in built if (model := reference()) is not None]
        with _LOCK:
            if _enabled is not None:
                for model in _outermost(alive):
                    _patch(model, _enabled)
    return result


class _AfterImport(MetaPathFinder):
    """Watches transformers' models as soon as the module that defines their base is imported."""

    def __init__(self) -> None:
        self._searching = False

    def find_spec(
        self, fullname: str, path: Any = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module's spec as the other finders give it, with a loader that reports to us."""
        if fullname != _MODELING or self._searching:
            return None
        self._searching = True  # another such finder may ask all finders, us among them
        try:
            specs = (f.find_spec(fullname, path, target) for f in sys.meta_path if f is not self)
            spec = next(filter(None, specs), None)
        finally:
            self._searching = False
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            loader.exec_module = functools.partial(self._load, loader, loader.exec_module)
        return spec

    def _load(self, loader: Any, load: Callable[[ModuleType], None], module: ModuleType) -> None:
        del loader.exec_module
        load(module)
        with _LOCK:
            if self in sys.meta_path and _enabled is not None:
                sys.meta_path.remove(self)
                _watch_models(_enabled)


_AFTER_IMPORT = _AfterImport()
