"""What all tests share: the rule of tolerance, and memory that shows what nobody wrote."""

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor

from flashpatch import dispatch
from flashpatch_kernels import decisions
from flashpatch_kernels.engines import TILED, TRITON_INSTALLED

# The same examples in every run, and no deadline on machines that do other things beside.
settings.register_profile("tests", derandomize=True, deadline=None, database=None)
settings.load_profile("tests")


def _assert_as_exact_as_pytorch(
    actual: Tensor, pytorch: Tensor, exact: Tensor, name: str = "result"
) -> None:
    """The error of `actual` is at most twice that of `pytorch`, plus rounding.

    Rounding is half a unit of the result's dtype, and eight units of the dtype that sums up.

    The error is the norm of the difference over the norm of `exact`: the largest difference of a
    small tensor would be a matter of luck.

    Args:
        actual: What the code under test computed.
        pytorch: What plain PyTorch computes in the same dtype.
        exact: The same in float64.
    """
    assert actual.shape == exact.shape, name
    assert actual.dtype == pytorch.dtype, name
    sums = torch.float64 if actual.dtype == torch.float64 else torch.float32
    rounding = torch.finfo(actual.dtype).eps / 2 + 8 * torch.finfo(sums).eps
    actual, pytorch, exact = (x.detach().double() for x in (actual, pytorch, exact))
    finite = exact.isfinite()
    assert torch.equal(actual[~finite], exact[~finite]), name
    size = exact[finite].norm().item()
    error = (actual - exact)[finite].norm().item()
    theirs = (pytorch - exact)[finite].norm().item()
    assert error <= 2 * theirs + rounding * size, (
        f"{name}: error {error:.2e}, PyTorch's {theirs:.2e}, of {size:.2e}"
    )


@pytest.fixture(scope="session")
def assert_as_exact_as_pytorch() -> Callable[..., None]:
    return _assert_as_exact_as_pytorch


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tensors this small are computed faster by one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def undecided() -> None:
    """What was decided for another test's calls would hide what this one replaces."""
    decisions.forget()


@pytest.fixture
def tiled_calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The options of the calls that an engine serves, all of which the tiled one gets."""
    calls: list[Any] = []
    run = dispatch.run

    def counted(q: Any, k: Any, v: Any, options: Any, name: str) -> Any:
        calls.append(options)
        return run(q, k, v, options, name)

    monkeypatch.setattr(dispatch, "run", counted)
    monkeypatch.setattr(dispatch, "choose", lambda call: TILED)
    return calls


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that PyTorch hands out unwritten is NaN, or the least integer."""

    def poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def poisoned(*args: object, **kwargs: object) -> Tensor:
            x = make(*args, **kwargs)
            if x.is_floating_point():
                return x.fill_(torch.nan)
            return x if x.dtype == torch.bool else x.fill_(torch.iinfo(x.dtype).min)

        return poisoned

    makers: list[tuple[Any, tuple[str, ...]]] = [
        (torch, ("empty", "empty_like", "empty_strided")),
        (Tensor, ("new_empty", "new_empty_strided")),
    ]
    if TRITON_INSTALLED:
        makers.append((import_module("flashpatch_kernels.triton.memory"), ("empty",)))
    for owner, names in makers:
        for name in names:
            monkeypatch.setattr(owner, name, poison(getattr(owner, name)))
