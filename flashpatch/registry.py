"""What is patched: one frozen `Patch` per third-party attention class, found by name.

Classes are named, never imported: a family that the installed transformers lacks simply never
matches, so this module needs no version checks and importing it costs nothing.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

KEEP: Any = object()
"""What a swap returns to leave the attribute of this module alone."""

Swap = Callable[[nn.Module], Any]


@dataclass(frozen=True)
class Patch:
    """What `apply` changes on every instance of one attention class.

    Attributes:
        owner: Full name of the class, `module.Class`.
        keyed: Whether the module's config gets the attention key `fpatch`, so that the class calls
            flashpatch through transformers' attention interface, or its model at least builds
            compact masks.
        swaps: Attribute -> function of the module that gives its new value, or `KEEP`. Use
            `functools.partial(function, module)` for methods, never a closure: a copied model would
            go on using the original's weights. Choose the narrowest attribute that sees q, k and v.
        replaces: Method -> attribute: methods that put another attention module there, which then
            is changed as the one before was.
        adds_mask: Whether the class adds the mask it is given to its scores and knows no other:
            then none may stand for a causal one.
        needs_key: Whether the swaps serve no module whose config cannot get the key, because an
            attention class without a patch reads it too.
        attends: False for a class that holds attention modules and builds what they are given: it
            is changed with them, and is no attention module itself.
    """

    owner: str
    keyed: bool = True
    swaps: Mapping[str, Swap] = field(default_factory=dict)
    replaces: Mapping[str, str] = field(default_factory=dict)
    adds_mask: bool = False
    needs_key: bool = True
    attends: bool = True


_PATCHES: dict[str, Patch] = {}


def register(patch: Patch) -> Patch:
    """Adds a patch to the registry, for `apply` calls from now on.

    Raises:
        TypeError: Not a `Patch`.
        ValueError: The owner is not a full class name, has a patch already, or nothing is changed.
    """
    if not isinstance(patch, Patch):
        raise TypeError(f"register takes a Patch, not {type(patch).__name__}")
    if "." not in patch.owner:
        raise ValueError(f"owner must be a full class name (module.Class), not {patch.owner!r}")
    if patch.owner in _PATCHES:
        raise ValueError(f"{patch.owner} already has a patch: {_PATCHES[patch.owner]}")
    if not (patch.keyed or patch.swaps or patch.replaces):
        raise ValueError(f"the patch of {patch.owner} changes nothing: set keyed or swaps")
    _PATCHES[patch.owner] = patch
    return patch


def full_name(cls: type) -> str:
    """The name by which classes are registered, `module.Class`."""
    return f"{cls.__module__}.{cls.__qualname__}"


def find(cls: type) -> Patch | None:
    """The patch for exactly this class, if there is one."""
    return _PATCHES.get(full_name(cls))


def registered() -> tuple[Patch, ...]:
    """Every patch, in registration order."""
    return tuple(_PATCHES.values())
