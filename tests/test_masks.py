"""Every mask of transformers arrives as the boolean mask that transformers would have made."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionMaskInterface, DynamicCache, MistralConfig, StaticCache
from transformers import masking_utils as creators

from flashpatch.masks import (
    COMPUTE_WITH_MASKS,
    documents_from_position_ids,
    expand,
    fpatch_mask,
    of_last_queries,
    pack,
    read_once,
    separate,
    unpack,
    within_window,
)
from flashpatch.patches.interface import is_causal
from flashpatch_kernels import masks
from flashpatch_kernels.masks import Band, Boolean, Intervals

WINDOW = 4
CREATORS = {
    "causal": creators.create_causal_mask,
    "bidirectional": creators.create_bidirectional_mask,
    "window": creators.create_sliding_window_causal_mask,
    "window, both sides": creators.create_bidirectional_sliding_window_mask,
    "chunked": creators.create_chunked_causal_mask,
}
BIDIRECTIONAL = {"bidirectional", "window, both sides"}


def full_mask(*args, **kwargs):
    """The whole boolean mask, nothing left out."""
    kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return creators.sdpa_mask(*args, **kwargs)


@pytest.fixture(autouse=True, scope="module")
def _registered():
    AttentionMaskInterface.register("compact", fpatch_mask)
    AttentionMaskInterface.register("full", full_mask)
    yield
    for name in ("compact", "full"):
        del creators.ALL_MASK_ATTENTION_FUNCTIONS._global_mapping[name]


def config(model_type="llama", **changes):
    facts = {"sliding_window": WINDOW, "attention_chunk_size": WINDOW, "is_causal": True}
    return SimpleNamespace(model_type=model_type, **(facts | changes))


def created(name, config, *args, **kwargs):
    """The mask that a creator makes for flashpatch, and the full one."""
    both = []
    for implementation in ("compact", "full"):
        config._attn_implementation = implementation
        both.append(CREATORS[name](config, *args, **kwargs))
    return both


def meaning(tensor, batch, n, m, causal=True):
    """The bool [B, 1, N, M] that a mask stands for; None as SDPA understands it."""
    if tensor is None:
        seen = torch.ones(n, m, dtype=torch.bool)
        seen = (seen.tril() if causal and n > 1 else seen)[None, None]
    else:
        seen = masks.allowed(unpack(tensor, n, m), n, m, tensor.device)
    return seen.expand(batch, 1, n, m)


def assert_same(pair, n, m, name="causal", compact=True):
    tensor, full = pair
    assert torch.equal(meaning(tensor, full.shape[0], n, m, name not in BIDIRECTIONAL), full)
    if tensor is not None and compact:
        assert tensor.dtype == torch.int32
        assert tensor.numel() <= full.shape[0] * (2 * max(n, 1) + m)
    elif tensor is not None:
        assert tensor.dtype == torch.bool


def paddings(batch, length):
    """2-D masks: left and right padding, holes, all ones, rows that see nothing."""
    j = torch.arange(length)
    some = torch.arange(1, batch + 1)[:, None]
    return {
        "none": None,
        "ones": torch.ones(batch, length, dtype=torch.long),
        "left": (j >= some).long(),
        "right": (j < length - some).long(),
        "holes": ((j + some) % 3 > 0).long(),
        "nothing": torch.zeros(batch, length, dtype=torch.long),
    }


PADDINGS = list(paddings(1, 1))


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("n", [1, 3, 5, 9])
@pytest.mark.parametrize("name", CREATORS)
def test_masks_without_a_cache_are_exact(name, n, padding):
    x, mask = torch.zeros(2, n, 8), paddings(2, n)[padding]
    pair = created(name, config(), inputs_embeds=x, attention_mask=mask, past_key_values=None)
    assert_same(pair, n, n, name)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", ["bidirectional", "window, both sides"])
def test_masks_of_cross_attention_are_exact(name, padding):
    # Not longer than the window where no padding makes transformers leave the window out.
    n, m = 3, 7
    x, states, mask = torch.zeros(2, n, 8), torch.zeros(2, m, 8), paddings(2, m)[padding]
    pair = created(name, config(), x, mask, encoder_hidden_states=states)
    assert_same(pair, n, m, name)


def caches(n_layers=1):
    """Caches of each kind, for a model with a window or without."""
    facts = {"num_hidden_layers": n_layers, "hidden_size": 8, "num_attention_heads": 1}
    facts |= {"num_key_value_heads": 1, "intermediate_size": 8, "head_dim": 8}
    window, none = (MistralConfig(**facts, sliding_window=w) for w in (WINDOW, None))
    return {
        ("causal", "dynamic"): DynamicCache(config=none),
        ("window", "dynamic"): DynamicCache(config=none),
        ("chunked", "dynamic"): DynamicCache(config=none),
        ("causal", "static"): StaticCache(config=none, max_cache_len=16),
        ("window", "static"): StaticCache(config=none, max_cache_len=16),
        ("chunked", "static"): StaticCache(config=none, max_cache_len=16),
        ("window", "sliding"): DynamicCache(config=window),
        ("window", "static sliding"): StaticCache(config=window, max_cache_len=16),
    }


@pytest.mark.parametrize("padding", PADDINGS[:-1])
@pytest.mark.parametrize("steps", [(5, 1, 1, 3, 1), (1, 2, 1), (9, 1, 1), (16,), (3, 3, 3, 3)])
@pytest.mark.parametrize("kind", caches())
def test_masks_with_a_cache_are_exact_at_every_step(kind, steps, padding):
    name, cache = kind[0], caches()[kind]
    for n, seen in zip(steps, itertools.accumulate(steps), strict=True):
        x, states = torch.zeros(2, n, 8), torch.zeros(2, 1, n, 8)
        mask = paddings(2, seen)[padding]
        tensor, full = created(name, config(), x, mask, past_key_values=cache)
        keys, _ = cache.update(states, states, 0)
        # Only now: a static cache has moved its counter on, which no mask may notice.
        assert full.shape[-1] == keys.shape[2]
        assert_same((tensor, full), n, keys.shape[2], name)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("model_type", COMPUTE_WITH_MASKS)
def test_models_that_read_masks_get_those_they_know(model_type, padding):
    # a compact mask was sliced as if it were one of keys; none, where a model had no attention but
    # eager's, was taken for bidirectional
    x, mask = torch.zeros(2, 6, 8), paddings(2, 6)[padding]
    tensor, full = created("window", config(model_type), x, mask, past_key_values=None)
    additive = COMPUTE_WITH_MASKS[model_type] is creators.eager_mask
    assert tensor.is_floating_point() == additive
    assert torch.equal(tensor == 0 if additive else tensor, full)


@pytest.mark.parametrize("kept", [1, 2])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", ["causal", "window"])
def test_last_queries_are_given_the_last_rows_of_a_mask(name, padding, kept):
    # one with padding could not be read for fewer queries than it was made for, and where it was
    # left out two queries were taken for the first ones
    x, mask = torch.zeros(2, 6, 8), paddings(2, 6)[padding]
    gemma4 = config("gemma4_text", num_kv_shared_layers=2, num_hidden_layers=4)
    tensor, full = created(name, gemma4, x, mask, past_key_values=None)
    sliced = of_last_queries(tensor[:, :, -kept:], kept, 6)
    assert torch.equal(meaning(sliced, 2, kept, 6), full[:, :, -kept:])


@pytest.mark.parametrize("padding", PADDINGS)
def test_an_assistant_may_flip_its_mask(padding):
    # of a compact one it swapped the ends of the intervals
    x, states, mask = torch.zeros(2, 1, 8), torch.zeros(2, 7, 8), paddings(2, 7)[padding]
    gemma4 = config("gemma4_text", num_kv_shared_layers=4, num_hidden_layers=4)
    made = created("window, both sides", gemma4, x, mask, encoder_hidden_states=states)
    tensor, full = (t.flip(-1) for t in made)
    assert torch.equal(tensor, full)


def test_no_mask_is_none_where_a_model_knows_no_causal_attention_without_one():
    # the images of bridgetower, which attend to all of an image, were computed causally
    x, tower = torch.zeros(2, 6, 8), config("bridgetower_text_model")
    assert created("causal", tower, x, None, past_key_values=None)[0] is not None
    assert created("bidirectional", tower, x, None)[0] is None
    assert not is_causal(SimpleNamespace(is_causal=True, config=tower), 6, None)
    assert is_causal(SimpleNamespace(is_causal=True, config=config()), 6, None)


@pytest.mark.parametrize("name", ["causal", "bidirectional"])
@pytest.mark.parametrize("n", [1, 6])
def test_plain_masks_are_left_out(name, n):
    x = torch.zeros(2, n, 8)
    tensor, _ = created(name, config(), inputs_embeds=x, attention_mask=None, past_key_values=None)
    assert tensor is None


def test_a_mask_is_left_out_for_an_empty_static_cache_and_for_steps_of_a_growing_one():
    x = torch.zeros(2, 6, 8)
    static, growing = caches()["causal", "static"], caches()["causal", "dynamic"]
    assert created("causal", config(), x, None, past_key_values=static)[0] is None
    growing.update(torch.zeros(2, 1, 6, 8), torch.zeros(2, 1, 6, 8), 0)
    assert created("causal", config(), x[:, :1], None, past_key_values=growing)[0] is None
    assert created("causal", config(), x[:, :2], None, past_key_values=growing)[0] is not None


@pytest.mark.parametrize("name", ["causal", "window", "chunked"])
def test_packed_documents_are_exact_where_transformers_recognises_them(name):
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 0], [3, 4, 0, 1, 2, 3, 4, 5, 6]])
    x = torch.zeros(2, 9, 8)
    pair = created(name, config(), x, None, past_key_values=None, position_ids=positions)
    assert_same(pair, 9, 9)
    assert not torch.equal(pair[1], created(name, config(), x, None, past_key_values=None)[1])


def image_numbers(kinds):
    """As Gemma 3 numbers its images: tokens of kind 1 between others."""
    image = kinds == 1
    starts = image & ~torch.nn.functional.pad(image, (1, 0))[:, :-1]
    return torch.where(image, starts.cumsum(-1) - 1, -1)


KINDS = torch.tensor([[0, 1, 1, 1, 0, 0, 1, 1, 0], [1, 1, 0, 1, 1, 1, 1, 1, 1]])


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", ["causal", "window"])
def test_image_blocks_are_exact(name, padding):
    arguments = torch.zeros(2, 9, 8), paddings(2, 9)[padding], None
    blocks = {"block_sequence_ids": image_numbers(KINDS)}
    assert_same(created(name, config("gemma3_text"), *arguments, **blocks), 9, 9)
    # Of other models it is not known that equal numbers stand side by side.
    assert_same(created(name, config("gemma"), *arguments, **blocks), 9, 9, compact=False)


def test_image_blocks_within_a_window_are_exact():
    overlays = {
        "or_mask_function": creators.blockwise_overlay(image_numbers(KINDS)),
        "and_mask_function": creators.sliding_window_overlay(2),
    }
    pair = created("causal", config("gemma3_text"), torch.zeros(2, 9, 8), None, None, **overlays)
    assert_same(pair, 9, 9)


def test_image_blocks_of_packed_documents_are_exact():
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 0], [3, 4, 0, 1, 2, 3, 4, 5, 6]])
    facts = {"position_ids": positions, "block_sequence_ids": image_numbers(KINDS)}
    x = torch.zeros(2, 9, 8)
    tensor, full = created("causal", config("gemma3_text"), x, None, None, **facts)
    assert torch.equal(meaning(tensor, 2, 9, 9), full)


@pytest.mark.parametrize("padding", PADDINGS)
def test_blocks_whose_numbers_recur_are_exact(padding):
    numbers = torch.tensor([[0, 0, -1, 1, 0, 0, 1, -1, 2], [-1, 0, -1, 0, -1, 0, -1, 0, -1]])
    arguments = torch.zeros(2, 9, 8), paddings(2, 9)[padding], None
    pair = created("causal", config("molmo2"), *arguments, block_sequence_ids=numbers)
    assert_same(pair, 9, 9, compact=False)


PREFIX = torch.tensor([3, 5])
RECURRING = torch.tensor([[0, 1, 0, 1, 1, 0, 2, 2, 0], [4, 4, 4, 4, 1, 1, 4, 4, 4]])
OVERLAYS = {
    # name: (overlays, whether the mask is one interval per query)
    "everything": ({"or_mask_function": lambda *_: torch.tensor(True)}, True),
    "prefix": ({"or_mask_function": lambda b, h, q, k: k < PREFIX[b]}, True),
    "window": ({"and_mask_function": creators.sliding_window_overlay(2)}, True),
    "future": ({"or_mask_function": lambda b, h, q, k: abs(q - k) < 3}, True),
    "documents": (
        {"and_mask_function": creators.packed_sequence_mask_function(RECURRING)},
        False,
    ),
    "strided": ({"and_mask_function": lambda b, h, q, k: (q - k) % 2 == 0}, False),
    "far key": ({"or_mask_function": lambda b, h, q, k: k == 8}, False),
    "both": (
        {
            "or_mask_function": lambda b, h, q, k: k < PREFIX[b],
            "and_mask_function": creators.sliding_window_overlay(2),
        },
        True,
    ),
}


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_mask_functions_of_users_are_exact(overlay, padding):
    functions, compact = OVERLAYS[overlay]
    x, mask = torch.zeros(2, 9, 8), paddings(2, 9)[padding]
    assert_same(created("causal", config(), x, mask, None, **functions), 9, 9, compact=compact)


def test_masks_for_generate_are_exact():
    layers = config(layer_types=["full_attention", "sliding_attention"])
    layers.get_text_config = lambda: layers
    x, mask = torch.zeros(2, 9, 8), paddings(2, 9)["left"]
    both = []
    for layers._attn_implementation in ("compact", "full"):
        both.append(creators.create_masks_for_generate(layers, x, mask, None))
    assert both[0].keys() == both[1].keys()
    for layer in both[0]:
        assert_same((both[0][layer], both[1][layer]), 9, 9)


def test_a_decoder_made_bidirectional_keeps_its_padding():
    x, mask = torch.zeros(2, 9, 8), paddings(2, 9)["holes"]
    for name in ("causal", "window"):
        pair = created(name, config(is_causal=False), x, mask, None)
        assert_same(pair, 9, 9, "bidirectional")


@st.composite
def calls(draw):
    """The arguments of a mask function, for any sizes and offsets."""
    batch, n, m = draw(st.integers(1, 3)), draw(st.integers(0, 9)), draw(st.integers(0, 12))
    q, k = draw(st.integers(0, 9)), draw(st.integers(0, 5))
    size = draw(st.integers(1, 6))
    left = torch.tensor(draw(st.lists(st.integers(0, 4), min_size=batch, max_size=batch)))
    function = draw(
        st.sampled_from(
            [
                creators.causal_mask_function,
                creators.bidirectional_mask_function,
                creators.sliding_window_causal_mask_function(size),
                creators.sliding_window_bidirectional_mask_function(size),
                creators.chunked_causal_mask_function(size, left),
                creators.add_offsets_to_mask_function(
                    creators.sliding_window_causal_mask_function(size), 2, 1
                ),
            ]
        )
    )
    length = draw(st.integers(0, m + k + 2))
    bits = draw(st.lists(st.booleans(), min_size=batch * length, max_size=batch * length))
    padded = draw(st.booleans())
    return {
        "batch_size": batch,
        "q_length": n,
        "kv_length": m,
        "q_offset": torch.tensor(q) if draw(st.booleans()) else q,
        "kv_offset": k,
        "mask_function": function,
        "attention_mask": torch.tensor(bits).bool().view(batch, length) if padded else None,
        "allow_is_causal_skip": False,
    }


@settings(max_examples=150, deadline=None)
@given(calls())
def test_masks_of_any_size_are_exact(call):
    n, m = call["q_length"], call["kv_length"]
    assert_same((fpatch_mask(**call), full_mask(**call)), n, m)


def test_no_mask_is_made_by_looking_at_data():
    facts = {"batch_size": 2, "q_length": 9, "kv_length": 9, "device": "meta"}
    numbers = torch.zeros(2, 9, dtype=torch.long, device="meta")
    causal = creators.causal_mask_function
    functions = {
        "causal": causal,
        "window": creators.sliding_window_causal_mask_function(3),
        "chunked": creators.chunked_causal_mask_function(3, numbers[:, 0]),
        "packed": creators.and_masks(causal, creators.packed_sequence_mask_function(numbers)),
        "blocks": creators.or_masks(causal, creators.blockwise_overlay(numbers)),
    }
    for function in functions.values():
        for padding in (None, numbers.bool()):
            tensor = fpatch_mask(
                **facts,
                q_offset=numbers[0, 0],
                mask_function=function,
                attention_mask=padding,
                config=config("gemma3_text"),
            )
            assert tensor.is_meta
            assert tensor.dtype == torch.int32


def test_masks_can_be_made_of_fake_tensors():
    with FakeTensorMode():
        padding = torch.ones(2, 9, dtype=torch.bool)
        tensor = fpatch_mask(2, 9, 9, attention_mask=padding)
        assert tensor.shape == (2, 1, 1, 27)


def test_masks_are_made_inside_a_compiled_graph():
    cache = caches()["causal", "static"]
    cache.update(torch.zeros(2, 1, 3, 8), torch.zeros(2, 1, 3, 8), 0)
    plain, gemma = config(), config("gemma3_text")
    plain._attn_implementation = gemma._attn_implementation = "compact"
    numbers = image_numbers(KINDS)
    overlays = {
        "or_mask_function": creators.blockwise_overlay(numbers),
        "and_mask_function": creators.sliding_window_overlay(2),
    }

    def every(x, mask, positions):
        step, seen = x[:, :1], mask[:, :4]
        return [
            creators.create_causal_mask(plain, x, mask, None),
            creators.create_causal_mask(plain, x, None, None, positions),
            creators.create_causal_mask(plain, step, seen, cache),
            creators.create_causal_mask(plain, step, None, cache),
            creators.create_bidirectional_mask(plain, x, mask),
            creators.create_sliding_window_causal_mask(plain, x, mask, None),
            creators.create_sliding_window_causal_mask(plain, x, None, None, positions),
            creators.create_bidirectional_sliding_window_mask(plain, x, mask),
            creators.create_chunked_causal_mask(plain, x, mask, None),
            creators.create_causal_mask(gemma, x, mask, None, block_sequence_ids=numbers),
            creators.create_causal_mask(gemma, x, mask, None, **overlays),
            creators.create_causal_mask(plain, x, mask, None, **OVERLAYS["everything"][0]),
            # Not readable, so filled in.
            creators.create_causal_mask(plain, x, mask, None, **OVERLAYS["strided"][0]),
            creators.create_causal_mask(plain, x, mask, None, block_sequence_ids=numbers),
        ]

    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 0], [3, 4, 0, 1, 2, 3, 4, 5, 6]])
    arguments = torch.zeros(2, 9, 8), paddings(2, 9)["holes"], positions
    torch._dynamo.reset()
    compiled = torch.compile(every, fullgraph=True, backend="eager")(*arguments)
    for got, expected in zip(compiled, every(*arguments), strict=True):
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)
    assert [tensor.dtype for tensor in compiled[-2:]] == [torch.bool, torch.bool]
    assert {tensor.dtype for tensor in compiled[:-2]} == {torch.int32}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("rows", [1, 5])
def test_packing_a_mask_and_unpacking_it_changes_nothing(batch, rows):
    bounds = torch.randint(0, 7, (batch, rows, 2), dtype=torch.int32)
    for runs in (None, masks.runs_of(torch.rand(2, 7) > 0.5)):
        mask = unpack(pack(Intervals(bounds, runs)), 5, 7)
        assert torch.equal(mask.bounds, bounds.expand_as(mask.bounds))
        assert mask.bounds.shape[1] == rows
        assert mask.runs is None if runs is None else torch.equal(mask.runs, runs)


def test_a_boolean_mask_is_unpacked_as_it_is():
    allowed = torch.rand(2, 3, 5, 7) > 0.5
    mask = unpack(allowed, 5, 7)
    assert isinstance(mask, Boolean)
    assert torch.equal(mask.allowed, allowed)


@pytest.mark.parametrize(
    ("name", "padding", "kind"),
    [
        ("bidirectional", [], Band),
        ("bidirectional", [2], Boolean),
        ("causal", [], Band),
        ("causal", [2], Intervals),
        ("window", [], Intervals),
    ],
)
def test_a_mask_is_read_in_the_form_that_is_computed_fastest(name, padding, kind):
    embeds, padded = torch.empty(2, 9, 1), torch.ones(2, 9, dtype=torch.int64)
    padded[1, padding] = 0
    got, expected = created(name, config(), embeds, padded, past_key_values=None)
    mask = read_once(got, 9, 9)
    assert isinstance(mask, kind)
    assert torch.equal(masks.allowed(mask, 9, 9, "cpu").expand(expected.shape), expected)
    assert read_once(got, 9, 9) is mask


def test_a_mask_that_was_changed_is_read_again():
    visible = torch.ones(1, 6, dtype=torch.bool)
    tensor = pack(masks.key_mask(visible))
    assert read_once(tensor, 4, 6) == Band()
    visible[0, 4] = False
    tensor.copy_(pack(masks.key_mask(visible)))
    assert torch.equal(masks.allowed(read_once(tensor, 4, 6), 4, 6, "cpu")[:, 0, 0], visible)


def test_inference_tensors_have_no_versions_and_are_read_each_time():
    with torch.inference_mode():
        tensor = pack(masks.key_mask(torch.ones(1, 6, dtype=torch.bool)))
        assert isinstance(read_once(tensor, 4, 6), Intervals)


def test_a_graph_is_recorded_for_any_mask():
    def seen(tensor):
        return masks.allowed(read_once(tensor, 5, 5), 5, 5, "cpu").expand(2, 1, 5, 5) & True

    full, other = (
        pack(Intervals(bounds, masks.runs_of(visible)))
        for bounds, visible in (
            (torch.tensor([0, 5], dtype=torch.int32).expand(2, 1, 2), torch.ones(2, 5) > 0),
            (torch.tensor([1, 4], dtype=torch.int32).expand(2, 1, 2), torch.rand(2, 5) > 0.5),
        )
    )
    graph = torch.compile(seen, backend="eager", fullgraph=True)
    for tensor in (full, other):
        assert torch.equal(graph(tensor), seen(tensor))
    assert graph(full).all()


def test_a_window_is_counted_from_the_position_of_each_query():
    band = within_window(Band(right=0), 5, 1, 12)
    seen = masks.allowed(band, 1, 12, "cpu")[0, 0, 0]
    assert seen.tolist() == [False] * 7 + [True] * 5
    # the same query as the ninth of a static cache of twelve
    static = Intervals(torch.tensor([[[0, 9]]], dtype=torch.int32))
    seen = masks.allowed(within_window(static, 5, 1, 12), 1, 12, "cpu")[0, 0, 0]
    assert seen.tolist() == [False] * 4 + [True] * 5 + [False] * 3


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2, 1, 5, 7), torch.int64),
        ((2, 7), torch.bool),
        ((2, 1, 1, 16), torch.int32),
        ((2, 1, 4, 2), torch.int32),
        ((2, 3, 5, 2), torch.int32),
    ],
)
def test_what_was_not_packed_is_refused_with_its_shape(shape, dtype):
    with pytest.raises(ValueError, match=str(list(shape)[-1])):
        unpack(torch.zeros(shape, dtype=dtype), 5, 7)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", CREATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_expanded_mask_is_what_eager_and_sdpa_would_have_been_given(name, padding, dtype):
    x, mask = torch.zeros(2, 9, 8, dtype=dtype), paddings(2, 9)[padding]
    made = {}
    for implementation in ("compact", "eager", "full"):
        names = config(_attn_implementation=implementation)
        made[implementation] = CREATORS[name](names, x, mask, past_key_values=None)
    tensor = made["compact"]
    causal = name not in BIDIRECTIONAL and tensor is None
    additive, expected = expand(tensor, 9, 9, x, causal=causal, additive=True), made["eager"]
    if additive is None:
        assert expected is None
    else:
        # Where transformers sees by the data that nothing is hidden, it leaves the mask out.
        expected = torch.zeros_like(additive) if expected is None else expected
        assert additive.dtype == expected.dtype == dtype
        assert torch.equal(additive.expand_as(expected), expected)
    boolean = expand(tensor, 9, 9, x, causal=causal, additive=False)
    assert (boolean is None) == (tensor is None)
    if boolean is not None:
        assert torch.equal(boolean.expand_as(made["full"]), made["full"])


def test_an_additive_mask_of_the_users_is_expanded_as_it_is():
    bias = torch.randn(2, 1, 5, 7)
    assert expand(bias, 5, 7, torch.zeros(2, 5, 8), causal=False, additive=True) is bias


def test_documents_begin_where_position_ids_do_not_rise_by_one():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [5, 6, 7, 8, 9, 10]])
    expected = torch.tensor([[0, 3], [0, 3], [0, 3], [3, 5], [3, 5], [5, 6]], dtype=torch.int32)
    bounds = documents_from_position_ids(positions).bounds
    assert torch.equal(bounds[0], expected)
    assert torch.equal(bounds[1], torch.tensor([[0, 6]] * 6, dtype=torch.int32))


def test_three_dimensional_position_ids_are_refused():
    with pytest.raises(ValueError, match=r"\[3, 2, 6\]"):
        documents_from_position_ids(torch.zeros(3, 2, 6, dtype=torch.long))


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("padding", PADDINGS)
def test_documents_are_separated_beside_any_mask(padding, rows):
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 0], [3, 4, 0, 1, 2, 3, 4, 5, 6]])[:rows]
    x, mask = torch.zeros(2, 9, 8), paddings(2, 9)[padding]
    number = creators.find_packed_sequence_indices(positions)
    same = (number[:, None, :, None] == number[:, None, None, :]).expand(2, 1, 9, 9)
    tensor, full = created("causal", config(), x, mask, None)
    for each in (Band(right=0) if tensor is None else unpack(tensor, 9, 9), Boolean(full)):
        apart = separate(each, positions, 9, 9)
        assert torch.equal(masks.allowed(apart, 9, 9, "cpu").expand_as(full), full & same)


def test_documents_of_a_cache_are_unknown():
    positions = torch.tensor([[0, 1, 0]])
    assert separate(Band(right=0), positions, 3, 9) == Band(right=0)
