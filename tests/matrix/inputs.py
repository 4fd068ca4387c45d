"""Arguments for any model's `forward`: made by the parameters' names from the config's sizes."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

BATCH, LENGTH = 2, 12


def configs_within(config: Any) -> Iterator[Any]:
    """The config and all within it, breadth first."""
    ahead = [config]
    while ahead:
        config = ahead.pop(0)
        yield config
        ahead += [v for v in vars(config).values() if isinstance(v, PreTrainedConfig)]


def look(config: Any, *names: str, default: Any = None) -> Any:
    """The first of the names that the config, or one within it, gives a value."""
    for inner in configs_within(config):
        for name in names:
            value = getattr(inner, name, None)
            if value is not None:
                return value
    if default is None:
        raise LookupError(f"{type(config).__name__} has none of {names}")
    return default


def draw(*shape: int) -> Tensor:
    """Random numbers, the same for a shape in every run."""
    seed = sum(size * 31**place for place, size in enumerate(shape))
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tokens(length: int = LENGTH, seed: int = 1, most: int = 60) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, most, (BATCH, length), generator=generator)


def side(config: Any, default: int = 16) -> tuple[int, int]:
    """Height and width of an image."""
    size = look(config, "image_size", "img_size", "input_size", default=default)
    if isinstance(size, dict):
        return size["height"], size["width"]
    return (size, size) if isinstance(size, int) else tuple(size)[-2:]


def pixels(model: Any) -> Tensor:
    channels = look(model.config, "num_channels", "in_channels", "in_chans", default=3)
    return draw(BATCH, channels, *side(model.config))


def video(model: Any) -> Tensor:
    frames = look(model.config, "num_frames", "frames_per_clip", "num_image", default=4)
    channels = look(model.config, "num_channels", "in_chans", default=3)
    return draw(BATCH, frames, channels, *side(model.config))


def patches_of(model: Any) -> Tensor:
    """The patches of `grid` in one sequence, each flattened."""
    size = look(model.config, "patch_size")
    times = look(model.config, "temporal_patch_size", "patch_temporal", default=1)
    channels = look(model.config, "in_channels", "num_channels", "in_chans", default=3)
    return draw(int(grid(model).prod(-1).sum()), channels * times * size * size)


def grid(model: Any) -> Tensor:
    """Frames, rows and columns of patches of two images."""
    merge = look(model.config, "spatial_merge_size", default=2)
    return torch.tensor([[1, 2 * merge, 2 * merge], [1, merge, 2 * merge]])


def sound(model: Any) -> Tensor:
    return draw(
        BATCH,
        look(model.config, "num_mel_bins", "n_mels", default=16),
        2 * look(model.config, "max_source_positions", default=64),
    )


MAKERS: dict[str, Callable[[Any], Any]] = {
    "decoder_input_ids": lambda model: tokens(LENGTH // 2, seed=2),
    "grid_thw": grid,
    "image_grid_thw": grid,
    "input_features": sound,
    "input_features_mask": lambda model: torch.ones(sound(model).shape[::2], dtype=torch.long),
    "input_ids": lambda model: tokens(),
    "input_values": lambda model: draw(BATCH, 400),
    "inputs_embeds": lambda model: draw(BATCH, LENGTH, look(model.config, "hidden_size")),
    "pixel_values": pixels,
    "pixel_values_videos": video,
}
# Of the optional parameters, those that are given where there are no others to say the same.
WANTED = (
    "input_ids",
    "decoder_input_ids",
    "pixel_values",
    "pixel_values_videos",
    "input_values",
    "input_features",
)


def inputs_by_name(model: Any, method: str = "forward") -> dict[str, Any]:
    """Arguments for a method: all that it requires, and the optional ones of `WANTED`.

    Raises:
        LookupError: A required one is not known.
    """
    parameters = inspect.signature(getattr(model, method)).parameters
    required = [
        name
        for name, p in parameters.items()
        if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]
    known = {*MAKERS, "hidden_states"} if "grid_thw" in parameters else MAKERS
    unknown = [name for name in required if name not in known]
    if unknown:
        raise LookupError(f"no input is known for {unknown}")
    main = model.main_input_name
    mains = (main,) if isinstance(main, str) else tuple(main)
    wanted = required or [name for name in mains if name in parameters and name in MAKERS]
    if not wanted:
        wanted = [name for name in WANTED if name in parameters][:1]
    if method == "forward" and not model.can_generate():  # towers beside each other
        wanted = [*wanted, *(name for name in WANTED if name in parameters and name not in wanted)]
    if {"grid_thw", "image_grid_thw"} & set(parameters):
        grids = [n for n in ("grid_thw", "image_grid_thw") if n in parameters]
        given = next((n for n in ("pixel_values", "hidden_states") if n in wanted), None)
        if given is not None:
            others = {n: MAKERS[n](model) for n in wanted if n != given}
            return {**others, given: patches_of(model), grids[0]: grid(model)}
    if "decoder_input_ids" in parameters and "decoder_input_ids" not in wanted:
        wanted = [*wanted, "decoder_input_ids"]
    return {name: MAKERS[name](model) for name in wanted}


def token_mask(padding: str, length: int = LENGTH) -> Tensor:
    """Two sequences, the second five tokens shorter: int64 [B, N]."""
    mask = torch.ones(BATCH, length, dtype=torch.long)
    mask[1, slice(0, 5) if padding == "left" else slice(-5, None)] = 0
    return mask
