"""The ways models call attention, a file each; importing this package fills the registry."""

from importlib import import_module

for _room in (
    "interface",
    "t5",
    "alibi",
    "attn_method",
    "relative",
    "deberta",
    "sliding",
    "bigbird",
    "explicit",
):
    import_module(f"{__name__}.{_room}")
