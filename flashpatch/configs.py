"""A model's own copies of its configs, so that a key set on one reaches no other model.

transformers reads the attention implementation from config objects, which modules share with each
other and, where the user built two models from one object, with other models.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

_IMPLEMENTATION = "_attn_implementation_internal"


@dataclass(frozen=True)
class ConfigCopy:
    """A config that stands in for the model's own while it is patched.

    Attributes:
        original: The object that the modules held, to be put back.
        stand_in: What they hold instead.
        before: The stand-in's attributes when it was made, to tell what was changed since.
    """

    original: Any
    stand_in: Any
    before: dict[str, Any]

    def hand_back(self) -> None:
        """Carries over to the original what was set meanwhile (`use_cache`, ...)."""
        now = vars(self.stand_in)
        for name, value in now.items():
            if name != _IMPLEMENTATION and (
                name not in self.before or self.before[name] is not value
            ):
                setattr(self.original, name, value)
        for name in self.before.keys() - now.keys():
            if hasattr(self.original, name):
                delattr(self.original, name)


def config_of(module: nn.Module) -> Any | None:
    """The config that the module itself holds, if it says which attention to use."""
    config = vars(module).get("config")
    return config if hasattr(config, _IMPLEMENTATION) else None


def implementation(config: Any) -> str:
    """The attention that a config names; "eager" where it names none."""
    return getattr(config, _IMPLEMENTATION, None) or "eager"


def copy_configs(model: nn.Module, keyed: Iterable[tuple[Any, str]]) -> dict[int, ConfigCopy]:
    """Copies of the configs in `keyed`, each with its key, and of the configs that contain them.

    Returns:
        id of the original config -> its copy, for every config that modules must hold instead.
    """
    held = {id(c): c for m in model.modules() if (c := config_of(m)) is not None}
    stand_ins: dict[int, Any] = {}
    for config, key in keyed:
        stand_in = copy.copy(config)
        setattr(stand_in, _IMPLEMENTATION, key)
        stand_ins[id(config)] = stand_in
        held[id(config)] = config
    grown = True
    while grown:  # a config of configs is copied too, until nothing new contains a copied one
        grown = False
        for ident, config in held.items():
            if ident not in stand_ins and any(id(v) in stand_ins for v in vars(config).values()):
                stand_ins[ident] = copy.copy(config)
                grown = True
    for stand_in in stand_ins.values():
        for name, value in vars(stand_in).items():
            if id(value) in stand_ins:
                vars(stand_in)[name] = stand_ins[id(value)]
    return {
        ident: ConfigCopy(held[ident], stand_in, dict(vars(stand_in)))
        for ident, stand_in in stand_ins.items()
    }
