"""How a model is patched and restored: attribute by attribute, exactly, on this model alone.

What was changed is recorded on each module while it is changed, so that undoing cannot differ from
doing, and a copied or pickled model carries its own record.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from torch import nn

import flashpatch.patches  # noqa: F401  (fills the registry)
from flashpatch.configs import ConfigCopy, config_of, copy_configs, implementation
from flashpatch.dispatch import OnFallback, Settings, log_once
from flashpatch.inspection import calls_interface, own_attention
from flashpatch.packing import unwatch, watch
from flashpatch.patches.interface import KEY, KEYS, MASKED_KEY
from flashpatch.patches.left import LEFT
from flashpatch.registry import KEEP, Patch, find, full_name
from flashpatch.report import Report, Row, describe
from flashpatch.weights import listen, stop
from flashpatch_kernels.engines import Reason

Patterns = str | Sequence[str] | None

_SETTINGS = "_flashpatch"
_RECORD = "_flashpatch_record"
_WRAPPERS = ("_orig_mod.", "module.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


class _Missing:
    """Stands for an attribute that the instance did not have; equal to itself after a copy."""


@dataclass(frozen=True)
class Undo:
    """One changed attribute of one module.

    Attributes:
        attribute: Its name.
        previous: The entry of the instance's `__dict__`, or `_Missing` if it had none.
        placed: What was put there.
    """

    attribute: str
    previous: Any
    placed: Any


@dataclass(frozen=True)
class Record:
    """What `apply` changed on one module, in order."""

    undos: tuple[Undo, ...] = ()
    config: ConfigCopy | None = None


@dataclass(frozen=True)
class Found:
    """One attention module that has a patch.

    Attributes:
        name: As in `model.named_modules()`.
        module: The module.
        patch: That of its class.
        active: False if `only` or `skip` leaves it alone, or if it does not attend itself.
        config: The config that says which attention it runs: its own, or that of the nearest module
            around it that holds one.
    """

    name: str
    module: nn.Module
    patch: Patch
    active: bool
    config: Any | None


def apply(
    model: nn.Module,
    *,
    only: Patterns = None,
    skip: Patterns = None,
    on_fallback: OnFallback = log_once,
    packing: str | None = None,
) -> Report:
    """Lets flashpatch serve the attention of every module of this model that has a patch.

    In place, and on this model only: its class and other models, even those built from the same
    config object, stay as they are. Parameters and `state_dict` are untouched. Applying again
    replaces the settings of the last time.

    Args:
        model: Any module that contains transformers models: a `PreTrainedModel`, a
            `SentenceTransformer`, a PEFT, compiled or DDP wrapper, ...
        only: Patterns (`fnmatch`) of the names of the attention modules to serve, e.g. "encoder.*".
            Names are those of `model.named_modules()`, with or without the wrappers' prefixes.
        skip: Patterns of the modules to leave alone. A module left alone runs what it ran before.
        on_fallback: Called with the `Reason` of each call that an engine cannot serve. Pass a
            function that raises to forbid fallbacks, or one that counts to count them. Not called
            while `torch.compile` traces.
        packing: None keeps the model's own answer for packed documents. "position_ids" separates
            documents wherever position ids restart, also where transformers itself lets them leak
            into each other: beside a mask of ones, with `use_cache`, in batches.

    Returns:
        What runs where, and why.

    Raises:
        TypeError: `model` is no module, or `on_fallback` cannot be called.
        ValueError: A pattern matches no attention module; `packing` is unknown.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"apply takes a torch.nn.Module, not {type(model).__name__}")
    if not callable(on_fallback):
        raise TypeError(f"on_fallback must be a function of a Reason, not {on_fallback!r}")
    if packing not in (None, "position_ids"):
        raise ValueError(f'packing must be None or "position_ids", not {packing!r}')
    found = _find(model, _patterns("only", only), _patterns("skip", skip))
    blocked = _config_reasons(model, found)
    kept = _kept(found, blocked)
    _copy_and_hold_configs(model, [f for f in kept if id(f.config) not in blocked])
    originals = _originals(model)
    for f in kept:
        _swap(f)
        original = implementation(originals.get(id(f.config), f.config))
        vars(f.module)[_SETTINGS] = Settings(f.active, original, on_fallback, packing)
    for outermost in _models(model):
        unwatch(outermost)
        if packing is None and any(_is_causal(f) for f in kept):
            watch(outermost)
    listen(model)
    return _report(model, found, kept, blocked)


def revert(model: nn.Module) -> None:
    """Restores every attribute that `apply` changed, by identity. Harmless if not applied.

    What was set on the model's config while it was patched is carried over.
    """
    copies: dict[int, ConfigCopy] = {}
    for module in model.modules():
        own = vars(module)
        own.pop(_SETTINGS, None)
        record: Record | None = own.pop(_RECORD, None)
        if record is None:
            continue
        for undo in reversed(record.undos):
            _undo(module, undo)
        if record.config is not None:
            copies[id(record.config.stand_in)] = record.config
    for config in copies.values():
        config.hand_back()
    for outermost in _models(model):
        unwatch(outermost)
    stop(model)


@contextmanager
def applied(
    model: nn.Module,
    *,
    only: Patterns = None,
    skip: Patterns = None,
    on_fallback: OnFallback = log_once,
    packing: str | None = None,
) -> Iterator[Report]:
    """`apply` for the length of a `with` block; at its end the model is as it was before.

    That is unpatched, or patched with the settings it had.
    """
    before = {m: vars(m)[_SETTINGS] for m in model.modules() if _SETTINGS in vars(m)}
    try:
        yield apply(model, only=only, skip=skip, on_fallback=on_fallback, packing=packing)
    finally:
        if not before:
            revert(model)
        for module, settings in before.items():
            vars(module)[_SETTINGS] = settings


def matching(model: nn.Module, patterns: Patterns) -> tuple[str, ...] | None:
    """Those of the patterns that match anything in this model, so that `apply` takes them."""
    given = _patterns("patterns", patterns)
    if given is None:
        return None
    modules = [(name, patch_of(type(module))) for name, module in model.named_modules()]
    names = {
        written for name, patch in modules if patch and patch.attends for written in _names(name)
    }
    return tuple(p for p in given if any(fnmatchcase(name, p) for name in names))


def _patterns(argument: str, patterns: Patterns) -> tuple[str, ...] | None:
    if patterns is None:
        return None
    given = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    for pattern in given:
        if not isinstance(pattern, str):
            raise TypeError(f"{argument} takes module-name patterns, not {pattern!r}")
    return given


def _models(model: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules that hold a config: the transformers models within a wrapper."""
    if config_of(model) is not None:
        yield model
        return
    for child in model.children():
        yield from _models(child)


def _is_causal(found: Found) -> bool:
    return found.active and bool(getattr(found.module, "is_causal", False))


def _names(name: str) -> tuple[str, ...]:
    """The module's name, and as it was before a wrapper prefixed it."""
    bare = name
    for wrapper in _WRAPPERS:
        bare = bare.replace(wrapper, "")
    bare = bare.removeprefix("base_model.model.")
    return name, bare


def patch_of(cls: type) -> Patch | None:
    """The patch for this class, unless the class does not do yet what the patch relies on.

    Attention classes have joined transformers' interface one by one.
    """
    patch = find(cls)
    if patch is None or patch.swaps or patch.replaces or calls_interface(cls):
        return patch
    return None


def _find(
    model: nn.Module, only: tuple[str, ...] | None, skip: tuple[str, ...] | None
) -> list[Found]:
    modules = [(n, m, p) for n, m in model.named_modules() if (p := patch_of(type(m))) is not None]
    unused = {*(only or ()), *(skip or ())}

    def matches(name: str, patterns: tuple[str, ...] | None) -> bool:
        hits = {p for p in patterns or () if any(fnmatchcase(n, p) for n in _names(name))}
        unused.difference_update(hits)
        return bool(hits)

    configs = _configs(model)
    found = []
    for name, module, patch in modules:
        active = patch.attends
        if active:
            wanted = only is None or matches(name, only)
            active = not matches(name, skip) and wanted
        found.append(Found(name, module, patch, active, configs[name]))
    if unused:
        attending = [repr(n) for n, _, p in modules if p.attends]
        names = ", ".join(attending[:3]) or "none"
        raise ValueError(
            f"the pattern {min(unused)!r} matches no patched attention module; there are "
            f"{len(attending)} of them: {names}{', ...' if len(attending) > 3 else ''}"
        )
    return found


def _configs(model: nn.Module) -> dict[str, Any | None]:
    """Name of each module -> its config, or else that of the nearest module around it."""
    configs: dict[str, Any | None] = {}
    for name, module in model.named_modules():
        around = name.rpartition(".")[0]
        configs[name] = config_of(module) or configs.get(around)
    return configs


def _config_reasons(model: nn.Module, found: Iterable[Found]) -> dict[int, Reason]:
    """Configs that must not get the key, because an attention class without a patch reads them.

    Where it holds none itself, it is given masks that were made by the config around it.
    """
    keyed = {id(f.config) for f in found if f.patch.keyed and f.config is not None}
    configs, reasons = _configs(model), {}
    for name, module in model.named_modules():
        cls = type(module)
        # PyTorch's own attention is given no masks of a model's, but pools its tokens
        config = config_of(module) if cls.__module__.startswith("torch.") else configs[name]
        if id(config) in keyed and patch_of(cls) is None and own_attention(cls):
            reasons[id(config)] = Reason(
                "SHARED_MASKS",
                f"the model shares its masks with {cls.__name__}, which has no patch",
            )
    return reasons


def _kept(found: Iterable[Found], blocked: dict[int, Reason]) -> list[Found]:
    """The modules that can be served, though the configs in `blocked` must not get the key."""
    return [f for f in found if id(f.config) not in blocked or not f.patch.needs_key]


def _copy_and_hold_configs(model: nn.Module, kept: Iterable[Found]) -> None:
    keyed = [
        f
        for f in kept
        if f.patch.keyed and f.config is not None and implementation(f.config) not in KEYS
    ]
    masked = {id(f.config) for f in keyed if f.patch.adds_mask}
    keys = {id(f.config): (f.config, MASKED_KEY if id(f.config) in masked else KEY) for f in keyed}
    copies = copy_configs(model, keys.values()) if keys else {}
    for module in model.modules():
        config = copies.get(id(config_of(module)))
        if config is not None:
            _place(module, "config", config.stand_in)
            record = vars(module)[_RECORD]
            vars(module)[_RECORD] = replace(record, config=config)


def _originals(model: nn.Module) -> dict[int, Any]:
    """The id of each config that stands in for another while patched -> that other."""
    records = (vars(m).get(_RECORD) for m in model.modules())
    return {id(r.config.stand_in): r.config.original for r in records if r and r.config}


def _swap(found: Found) -> None:
    record: Record = vars(found.module).get(_RECORD, Record())
    done = {undo.attribute for undo in record.undos}
    for attribute, swap in found.patch.swaps.items():
        value = KEEP if _slot(found.module, attribute) in done else swap(found.module)
        if value is not KEEP:
            _place(found.module, _slot(found.module, attribute), value)
    for method, attribute in found.patch.replaces.items():
        if method not in done:
            _place(found.module, method, partial(_replace, method, attribute, found.module))
    if found.patch.swaps and _REPLICATE not in done:
        _place(found.module, _REPLICATE, partial(_replicate, found.module))


_REPLICATE = "_replicate_for_data_parallel"


def _replicate(module: nn.Module) -> nn.Module:
    """The copy of a module that `nn.DataParallel` makes for a device, with methods of its own."""
    replica = type(module)._replicate_for_data_parallel(module)
    own = vars(replica)
    for attribute, value in own.items():
        if isinstance(value, partial) and any(a is module for a in value.args):
            args = (replica if a is module else a for a in value.args)
            own[attribute] = partial(value.func, *args)
    return replica


def _replace(method: str, attribute: str, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A class's own method, which puts another module in the place of a patched one."""
    before = getattr(module, attribute)
    result = getattr(type(module), method)(module, *args, **kwargs)
    after = getattr(module, attribute)
    patch, settings = patch_of(type(after)), vars(before).get(_SETTINGS)
    if after is not before and patch is not None and settings is not None:
        _swap(Found("", after, patch, settings.active, None))
        vars(after)[_SETTINGS] = settings
    return result


def _slot(module: nn.Module, attribute: str) -> str:
    """Where an attribute is to be replaced: accelerate's hooks call what they keep aside."""
    hooked = attribute == "forward" and "_old_forward" in vars(module)
    return "_old_forward" if hooked else attribute


def _place(module: nn.Module, attribute: str, value: Any) -> None:
    own = vars(module)
    record: Record = own.get(_RECORD, Record())
    undo = Undo(attribute, own.get(attribute, _Missing), value)
    own[_RECORD] = replace(record, undos=(*record.undos, undo))
    own[attribute] = value


def _undo(module: nn.Module, undo: Undo) -> None:
    """Puts one attribute back, wherever a hook has moved it meanwhile."""
    own = vars(module)
    for slot in (undo.attribute, *_ASIDE.get(undo.attribute, ())):
        if own.get(slot, _Missing) is undo.placed:
            if undo.previous is not _Missing:
                own[slot] = undo.previous
            elif slot == undo.attribute:
                del own[slot]
            else:  # the hook's own copy: give it what it would have found
                own[slot] = getattr(type(module), undo.attribute).__get__(module)


_ASIDE = {"forward": ("_old_forward",), "_old_forward": ("forward",)}


def _report(
    model: nn.Module, found: Sequence[Found], kept: Sequence[Found], blocked: dict[int, Reason]
) -> Report:
    served = {id(f.module) for f in kept}
    rows = []
    for f in (f for f in found if f.patch.attends):
        if id(f.module) not in served:
            outcome: Any = blocked[id(f.config)]
        else:
            outcome = describe(f.module, f.active)
        rows.append(Row(f.name, type(f.module).__name__, outcome))
    for name, module in model.named_modules():
        if patch_of(type(module)) is None and own_attention(type(module)):
            rows.append(Row(name, type(module).__name__, why_left(type(module))))
    return Report.of(rows)


NO_PATCH = Reason("NO_PATCH", "no patch for this class")


def why_left(cls: type) -> Reason:
    """Why an attention class without a patch has none."""
    return LEFT.get(full_name(cls), NO_PATCH)


def report_of(model: nn.Module) -> Report:
    """What runs where as the model is now: on another device, say, than when it was patched."""
    found = [
        replace(f, active=getattr(vars(f.module).get(_SETTINGS), "active", False))
        for f in _find(model, None, None)
    ]
    blocked = _config_reasons(model, found)
    return _report(model, found, _kept(found, blocked), blocked)


def patched_modules(model: nn.Module) -> list[str]:
    """Names of the modules that flashpatch serves now."""
    return [
        name
        for name, module in model.named_modules()
        if getattr(vars(module).get(_SETTINGS), "active", False)
    ]
