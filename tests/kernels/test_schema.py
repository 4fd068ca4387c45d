"""The record of options, flattened to an operator's arguments and back."""

from dataclasses import fields

import pytest
import torch

from flashpatch_kernels import schema

RELATIVE = ("relative_queries", "relative_keys", "relative_values")
TERMS = ("softcap", "table", "bias", "sinks", *RELATIVE)


@pytest.fixture(params=[(), TERMS, ("clamped table",), ("slopes",)], ids=len)
def options(request, sample, mask_name):
    return sample(mask_name, terms=request.param, dropout=0.1).options


def assert_same(one, other):
    """The same values, and the very same tensors, in records within records."""
    assert type(one) is type(other)
    if isinstance(one, (torch.Tensor, str, int, float, type(None))):
        assert one is other or one == other
        return
    for field in fields(one):
        assert_same(getattr(one, field.name), getattr(other, field.name))


def test_a_record_comes_back_as_it_was(options):
    flat = schema.flat(options)
    assert len(flat) == len(schema.NAMES)
    assert_same(schema.record(*flat), options)


def test_tensors_saved_apart_come_back_to_their_places(options):
    flat = schema.flat(options)
    plain, tensors = schema.apart(flat)
    assert not any(isinstance(x, torch.Tensor) for x in plain)
    assert len(tensors) == sum(isinstance(x, torch.Tensor) for x in flat)
    again = schema.together(plain, tensors)
    assert all(x is y or x == y for x, y in zip(again, flat, strict=True))


def test_a_list_has_a_list_of_no_gradients():
    assert schema.none_of([0.5, [torch.rand(2), torch.rand(3)], None]) == [None, [None] * 2, None]
