"""transformers' masks as intervals of keys: O(N) numbers where its own are N x M.

`fpatch_mask` is the mask function that transformers calls under the key `fpatch`. What it returns
travels through the model as a 4-D int32 tensor, which survives `generate`, static caches and
compilation where an object does not; `unpack` reads it where attention is computed. A mask that is
not one interval of keys per query (up to keys hidden from all queries) is the boolean tensor that
SDPA would have been given, made by transformers itself.

Letters: B batch, N queries, M keys.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import masking_utils
from transformers.utils.import_utils import is_tracing

from flashpatch.symbols import BLOCKS, DOCUMENTS, Place, read
from flashpatch_kernels.masks import (
    Band,
    Boolean,
    Intervals,
    Mask,
    allowed,
    band_bounds,
    documents,
    intersect,
    key_mask,
)

# Models that number the blocks of tokens that see each other, their images, by counting where
# blocks begin (gemma*: `get_block_sequence_ids_for_mask`) or by slicing (deepseek_ocr2): whatever
# the input, equal numbers stand side by side, and a block is an interval. Elsewhere the numbers are
# an input of the user's (paligemma, git, hrm_text: token types) or recur (molmo2: all images are
# one block), and the mask is materialised.
NUMBER_BLOCKS_IN_RUNS = frozenset(
    (
        "deepseek_ocr2_encoder",
        "diffusion_gemma_text",
        "gemma3_text",
        "gemma4_text",
        "gemma4_unified_text",
    )
)

# Models that slice, merge or read masks themselves before they give them to attention, each with
# the function of transformers that makes what they expect: booleans, or numbers to add where the
# model knows eager attention alone.
COMPUTE_WITH_MASKS: dict[str, Callable[..., Tensor | None]] = {
    "axk2": masking_utils.eager_mask,
    "deepseek_v32": masking_utils.eager_mask,
    "deepseek_v4": masking_utils.eager_mask,
    "doge": masking_utils.eager_mask,
    "dots3_note_text": masking_utils.sdpa_mask,
    "glm_moe_dsa": masking_utils.eager_mask,
    "hy_v4": masking_utils.sdpa_mask,
    "informer": masking_utils.eager_mask,
    "lasr_encoder": masking_utils.sdpa_mask,
    "lightglue": masking_utils.sdpa_mask,
    "mistral_large4_text": masking_utils.sdpa_mask,
    "nllb-moe": masking_utils.eager_mask,
    "pix2struct_text_model": masking_utils.sdpa_mask,
    "qwen4_exp_text": masking_utils.sdpa_mask,
    "t5gemma2_decoder": masking_utils.sdpa_mask,
}
# Models that do so for the one query by which they pool, whose mask they repeat for each head.
POOL_WITH_MASKS = frozenset(("siglip2_vision_model",))

# Models whose attention says that it is causal and, as they run on eager attention alone, is not
# where it is given no mask: the images that bridgetower shows to its text.
NONE_IS_NO_MASK = frozenset(("bridgetower", "bridgetower_text_model"))

# Models whose last layers, where they share the keys of others, are given the last queries alone
# and what was the mask of all, sliced as a dense one is.
DROP_QUERIES = frozenset(("gemma4_text", "gemma4_unified_text"))


def fpatch_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    config: Any = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask of a layer, as transformers asks for it; nothing is decided by data.

    Args:
        batch_size: B.
        q_length: N.
        kv_length: M.
        q_offset: Position of the first query; a static cache gives its live counter, a tensor.
        kv_offset: Position of the first key.
        mask_function: f(batch, head, query, key) -> bool.
        attention_mask: [B, positions], true for the keys that are not padding.
        local_size: Size of the window or chunk that the function describes.
        allow_is_causal_skip: Whether None may stand for a causal mask.
        allow_is_bidirectional_skip: Whether None may stand for no mask.
        use_vmap: Whether the function is, in part, not transformers' own.
        device: Where the mask is needed.
        config: The model's, of which the type is read.
        kwargs: What other mask functions need.

    Returns:
        None (causal or no mask, as the module says), int32 as `unpack` reads it, or [B, 1, N, M]:
        bool, or additive for some of `COMPUTE_WITH_MASKS`.
    """
    model_type = getattr(config, "model_type", "")
    given = {
        "batch_size": batch_size,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": mask_function,
        "attention_mask": attention_mask,
        "local_size": local_size,
        "use_vmap": use_vmap,
        "device": device,
        **kwargs,
    }
    make = COMPUTE_WITH_MASKS.get(model_type)
    sharing = config.num_kv_shared_layers if model_type in DROP_QUERIES else 0
    flips = sharing and sharing == config.num_hidden_layers  # an assistant, which flips its masks
    if flips or (q_length == 1 and model_type in POOL_WITH_MASKS):
        make = masking_utils.sdpa_mask
    if make is not None:
        return make(
            **given,
            allow_is_causal_skip=allow_is_causal_skip,
            allow_is_bidirectional_skip=allow_is_bidirectional_skip,
        )
    if attention_mask is None:
        local = local_size is not None and kv_length >= local_size
        if allow_is_bidirectional_skip and not local:
            return None
        if (
            allow_is_causal_skip
            and model_type not in NONE_IS_NO_MASK
            and not (sharing and q_length > 1)
            and not local
            and _none_is_causal(q_length, kv_length, q_offset, kv_offset)
        ):
            return None
    mask = _intervals(
        Place(
            (torch.arange(q_length, device=device) + q_offset)[None],
            batch_size,
            kv_offset,
            kv_length,
        ),
        mask_function,
        attention_mask,
        sole_author=not use_vmap,
        model_type=model_type,
    )
    if mask is not None:
        return pack(mask)
    return masking_utils.sdpa_mask(
        **given, allow_is_causal_skip=False, allow_is_bidirectional_skip=False
    )


def fpatch_whole_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """As `fpatch_mask`; None stands for no mask only."""
    return fpatch_mask(*args, **{**kwargs, "allow_is_causal_skip": False})


def _none_is_causal(n_queries: int, n_keys: int, first_query: int | Tensor, first_key: int) -> bool:
    """Whether attention without a mask does what a causal mask says.

    A single query then sees all keys; more of them and the keys are matched from the first on,
    which transformers relies on where M = N, or where a static cache is empty.

    Source: transformers, `_ignore_causal_mask_sdpa`.
    """
    if isinstance(first_query, Tensor):
        return False
    if n_queries == 1:
        return first_query + 1 >= first_key + n_keys
    return first_query == first_key and (n_queries == n_keys or first_query == 0)


def _intervals(
    place: Place,
    mask_function: Callable[..., Any],
    attention_mask: Tensor | None,
    *,
    sole_author: bool,
    model_type: str | None,
) -> Intervals | None:
    """The mask as intervals, or None if it is not known to be such.

    Args:
        place: Where queries and keys stand.
        mask_function: f(batch, head, query, key) -> bool.
        attention_mask: [B, positions] or None.
        sole_author: Whether all of the function was written by transformers. It then compares the
            numbers of packed documents only as it counted them itself, so that equal ones stand
            side by side.
        model_type: Names the model.
    """
    visible = None
    if attention_mask is not None:
        if attention_mask.ndim != 2 or attention_mask.shape[0] < place.batch:
            return None
        visible = _visible(attention_mask[: place.batch], place)
    condition = read(mask_function, place)
    if condition is None:
        return None
    if DOCUMENTS in condition.given and not sole_author:
        return None
    if BLOCKS in condition.given and model_type not in NUMBER_BLOCKS_IN_RUNS:
        return None
    if condition.visible is not None:
        visible = condition.visible if visible is None else condition.visible & visible
    if visible is not None and condition.low is None and condition.high is None:
        return key_mask(visible)
    mask = Intervals(condition.bounds())
    if visible is None:
        return mask
    n_queries, n_keys = place.positions.shape[1], place.n_keys
    both = intersect(key_mask(visible), mask, n_queries, n_keys, visible.device)
    assert isinstance(both, Intervals)
    return both


def _visible(attention_mask: Tensor, place: Place) -> Tensor:
    """Which keys are not padding, bool [B, M]; those beyond the mask's end are."""
    stop = place.first_key + place.n_keys
    missing = stop - attention_mask.shape[1]
    seen = attention_mask != 0
    if missing > 0:
        seen = functional.pad(seen, (0, missing))
    return seen[:, place.first_key : stop].to(place.positions.device)


def pack(mask: Intervals) -> Tensor:
    """Intervals as one 4-D tensor for the way through the model.

    Returns:
        int32. Without hidden keys the bounds, [B|1, 1, N|1, 2]; else [B, 1, 1, 2 N + M] or
        [B, 1, 1, 2 + M], in each row the bounds of all queries and then the runs.
    """
    if mask.runs is None:
        return mask.bounds[:, None]
    batch = max(mask.bounds.shape[0], mask.runs.shape[0])
    bounds = mask.bounds.flatten(1).expand(batch, -1)
    return torch.cat((bounds, mask.runs.expand(batch, -1)), dim=1)[:, None, None]


def unpack(tensor: Tensor, n_queries: int, n_keys: int) -> Mask:
    """The mask that a 4-D tensor holds: int32 as `pack` lays it out, or bool [B|1, H|1, N|1, M].

    Raises:
        ValueError: Neither, or not for so many queries and keys.
    """
    if tensor.dtype == torch.bool and tensor.ndim == 4:
        return Boolean(tensor[..., :n_keys])
    if tensor.dtype != torch.int32 or tensor.ndim != 4 or tensor.shape[1] != 1:
        raise ValueError(f"a mask of {tensor.dtype} {list(tensor.shape)} was not made by `pack`")
    rows, length = tensor.shape[2:]
    if length == 2 and rows in (1, n_queries):
        return Intervals(tensor[:, 0])
    for n in (n_queries, 1):
        if rows == 1 and length == 2 * n + n_keys:
            bounds, runs = tensor.flatten(1).split((2 * n, n_keys), dim=1)
            return Intervals(bounds.unflatten(1, (n, 2)), runs)
    raise ValueError(
        f"a mask of shape {list(tensor.shape)} is not for {n_queries} queries and {n_keys} keys"
    )


def of_last_queries(tensor: Tensor | None, n_queries: int, n_keys: int) -> Tensor | None:
    """The mask of a model's last queries, from one that `pack` made for all of them.

    Sliced in its third dimension as a dense mask is, one with runs has remained whole.
    """
    if tensor is None or tensor.dtype != torch.int32 or tensor.shape[2] > 1:
        return tensor
    given = (tensor.shape[3] - n_keys) // 2
    if given <= n_queries:
        return tensor
    return tensor[..., 2 * (given - n_queries) :]


def read_once(tensor: Tensor, n_queries: int, n_keys: int) -> Mask:
    """As `unpack`; on a CPU in the form that is computed fastest, found once for all layers.

    There a look at the data waits for nothing, and a small call takes less time than the dozen
    operations that a mask needs. Not on a GPU, nor where a graph is recorded for other data. What
    was found is kept with the tensor, which all layers of a model are given.
    """
    if tensor.device.type != "cpu" or torch.compiler.is_compiling() or tensor.is_inference():
        return unpack(tensor, n_queries, n_keys)
    state = (tensor._version, n_queries, n_keys)
    known, mask = getattr(tensor, "_flashpatch", (None, Band()))
    if known == state:
        return mask
    mask = unpack(tensor, n_queries, n_keys)
    if isinstance(mask, Intervals) and not is_tracing(tensor):
        mask = _simplest(mask, n_queries, n_keys)
    tensor._flashpatch = (state, mask)  # pyright: ignore[reportAttributeAccessIssue]
    return mask


def _simplest(mask: Intervals, n_queries: int, n_keys: int) -> Mask:
    """The same mask as a band if it is full or causal, as booleans if it is of keys alone."""
    if mask.runs is None or mask.runs.all():
        for band in (Band(), Band(right=0)):
            if (mask.bounds == band_bounds(band, n_queries, n_keys, mask.bounds.device)).all():
                return band
    if mask.bounds.shape[1] == 1:
        return Boolean(allowed(mask, n_queries, n_keys, mask.bounds.device))
    return mask


def expand(
    tensor: Tensor | None,
    n_queries: int,
    n_keys: int,
    query: Tensor,
    *,
    causal: bool,
    additive: bool,
) -> Tensor | None:
    """The mask as transformers' own functions under `sdpa` and `eager` would have been given it.

    Args:
        tensor: As `fpatch_mask` returns it, or a mask of the user's.
        n_queries: N.
        n_keys: M.
        query: Of its dtype an additive mask is, on its device a new one.
        causal: What None means: causal from the first key on, or no mask.
        additive: For eager attention, which adds the mask, and to which None is no mask. SDPA's
            takes a boolean one, and None for both.

    Returns:
        None, bool or additive [B|1, 1, N, M], with the dtype's least number where a key is hidden.
    """
    if tensor is None:
        if not (causal and additive):
            return None
        seen = allowed(Band(right=0), n_queries, n_keys, query.device)
    elif tensor.is_floating_point():
        return tensor
    else:
        seen = allowed(unpack(tensor, n_queries, n_keys), n_queries, n_keys, tensor.device)
        seen = seen.expand(-1, -1, n_queries, -1)
    if not additive:
        return seen
    zero = torch.zeros((), dtype=query.dtype, device=seen.device)
    return torch.where(seen, zero, torch.finfo(query.dtype).min)


def documents_from_position_ids(position_ids: Tensor) -> Intervals:
    """Packed documents: one begins wherever position ids, int [B|1, N], do not rise by one.

    Source: transformers, `find_packed_sequence_indices`.
    """
    if position_ids.ndim != 2:
        raise ValueError(f"position_ids are [B, N], not {list(position_ids.shape)}")
    before = position_ids[:, :1] - 1
    restarts = torch.diff(position_ids, prepend=before, dim=-1) != 1
    return documents(restarts.cumsum(-1))


def separate(mask: Mask, position_ids: Tensor, n_queries: int, n_keys: int) -> Mask:
    """The mask within packed documents, whose position ids, int [B|1, N], restart.

    Where queries and keys are not the same tokens (a cache held some before, or has room for more)
    the documents of the keys are unknown, and the mask remains as it is.
    """
    if n_queries != n_keys:
        return mask
    pages = documents_from_position_ids(position_ids)
    return intersect(mask, pages, n_queries, n_keys, position_ids.device)


def within_window(mask: Mask, window: int, n_queries: int, n_keys: int) -> Mask:
    """A causal mask, of which each query sees no more than its last `window` keys."""
    if isinstance(mask, Intervals):
        # by the end of each interval: unlike M it also tells the position within a static cache
        hi = mask.bounds[..., 1]
        lo = torch.maximum(mask.bounds[..., 0], hi - window)
        return replace(mask, bounds=torch.stack((lo, hi), dim=-1))
    band = Band(left=window - 1, right=0, offset=n_keys - n_queries)
    if isinstance(mask, Band):
        return band
    return intersect(mask, band, n_queries, n_keys, mask.allowed.device)
