"""The registry of patches."""

import pytest

from flashpatch import registry
from flashpatch.registry import Patch, find, register, registered


@pytest.fixture(autouse=True)
def empty_registry(monkeypatch):
    monkeypatch.setattr(registry, "_PATCHES", {})


def test_a_registered_class_is_found_by_its_exact_name():
    class Child(Patch):
        pass

    patch = register(Patch(f"{Patch.__module__}.{Patch.__qualname__}"))
    assert find(Patch) is patch
    assert find(Child) is None
    assert registered() == (patch,)


@pytest.mark.parametrize(
    ("patch", "error", "word"),
    [
        ("a.B", TypeError, "str"),
        (Patch("Attention"), ValueError, "'Attention'"),
        (Patch("a.B", keyed=False), ValueError, "changes nothing"),
    ],
)
def test_a_bad_patch_is_refused_with_the_offending_value(patch, error, word):
    with pytest.raises(error, match=word):
        register(patch)


def test_a_second_patch_of_one_class_is_refused():
    register(Patch("a.B"))
    with pytest.raises(ValueError, match=r"a\.B already has a patch"):
        register(Patch("a.B"))
