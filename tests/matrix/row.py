"""What a row of the matrix says where the generic tiny model of its type does not do."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """The exceptions of one model type.

    Attributes:
        config: What differs from the generic small config, dicts for the configs within it.
        model: Name of the model class, instead of the one that the auto classes give.
        inputs: (model) -> arguments of `forward`, instead of those made by name.
        more: (model) -> arguments that take the place of some of the generic ones.
        calls: Entries besides `forward`: name of a method, which may be one of a part of the model
            ("encoder.forward") -> (model) -> its arguments; None leaves out one that would be
            tried, "forward" too, which is otherwise one more call of it.
        reference: The attention that is right where the model's eager one is known to be wrong;
            a dict says it for each config within.
        paddings: How token masks may be padded; fewer where the model itself mixes padding in.
        generates: Whether greedy generation is compared, if the class can generate.
        training: Whether the model is in training mode, in which it has no dropout here either.
        left: Attention classes that are left in this transformers.
        needs: A package without which transformers cannot build the model.
        broken: Why transformers itself cannot build the model.
        because: Why `reference`, `paddings`, `generates` or `training` differ, or what else is to
            be known.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    model: str | None = None
    inputs: Callable[[Any], dict[str, Any]] | None = None
    more: Callable[[Any], dict[str, Any]] | None = None
    calls: Mapping[str, Callable[[Any], dict[str, Any]] | None] = field(default_factory=dict)
    reference: str | dict[str, str] = "eager"
    paddings: tuple[str, ...] = ("left", "right")
    generates: bool = True
    training: bool = False
    left: tuple[str, ...] = ()
    needs: str = ""
    broken: str = ""
    because: str = ""
