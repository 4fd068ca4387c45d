"""What the tests of families that compute attention within `forward` share."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from flashpatch import dispatch
from flashpatch_kernels.engines import TILED


def _assert_same_step(ours: Any, theirs: Any) -> None:
    """Compares outputs, and the gradients of all parameters by their names."""
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-5)
    assert ours[1].keys() == theirs[1].keys()
    # some gradients are zero but for rounding, such as that of the bias of the keys
    least = max(float(g.abs().max()) for g in theirs[1].values()) / 100
    for name, gradient in theirs[1].items():
        error = float((ours[1][name] - gradient).abs().max())
        assert error <= 5e-5 * max(float(gradient.abs().max()), least), name


@pytest.fixture(scope="session")
def assert_same_step() -> Callable[[Any, Any], None]:
    return _assert_same_step


@pytest.fixture
def everything_tiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain calls too are computed by the engine that serves the others."""
    monkeypatch.setattr(dispatch, "choose", lambda call: TILED)
