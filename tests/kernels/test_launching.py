"""How launches are made, and made again, with drivers that only note them; and their memory."""

from contextlib import nullcontext

import pytest
import torch
from torch._C._dynamo import guards

triton = pytest.importorskip("triton", minversion="3.6", reason="Triton 3.6 is not installed")

from triton.backends.nvidia.driver import CudaLauncher  # noqa: E402
from written_launches import Compiled, Flat, Launcher, layout  # noqa: E402

from flashpatch_kernels.triton import launching, memory  # noqa: E402
from flashpatch_kernels.triton.relaunching import Launch, given  # noqa: E402
from flashpatch_kernels.tuning import Tile  # noqa: E402

TILE = Tile(64, 64, 4, 1)


class Nested(Launcher):
    """As in Triton 3.7."""

    def __call__(self, x, y, z, stream, function, metadata, told, before, after, *arguments):
        scratch = self.scratch(x, stream)
        self.launch(
            *(x, y, z, stream, function, False, False, metadata, told, before, after),
            *(scratch, None, [], b"", arguments),
        )


def installed(launch, global_scratch_size=0):
    """The launcher of the Triton that is installed, which cannot be made without a card."""
    launcher = object.__new__(CudaLauncher)
    launcher.num_ctas, launcher.launch = 1, launch
    launcher.global_scratch_size, launcher.global_scratch_align = global_scratch_size, 128
    launcher.profile_scratch_size, launcher.profile_scratch_align = 0, 1
    launcher.launch_cooperative_grid = launcher.launch_pdl = launcher.gsan_enabled = False
    launcher.arg_annotations, launcher.kernel_signature = [], b""
    return launcher


@pytest.fixture
def compiled(driver):
    return Compiled()


def test_a_launch_goes_to_the_current_stream(compiled):
    launching.start(compiled, 9, TILE, ["q", 5])
    rest = (None, None, None, "q", 5)
    assert compiled.ran == [(9, 1, 1, 7, "function", "metadata", *rest)]


@pytest.mark.parametrize("which", ["launch_enter_hook", "launch_exit_hook"])
@pytest.mark.parametrize("replaced", [False, True])
def test_hooks_are_told_of_launches(compiled, monkeypatch, which, replaced):
    def hook(*_):
        pass

    runtime = triton.knobs.runtime
    if replaced:
        monkeypatch.setattr(runtime, which, hook)
    else:
        monkeypatch.setattr(getattr(runtime, which), "calls", [hook])
    launching.start(compiled, 9, TILE, ["q", 5])
    assert compiled.ran == [((9, 1, 1), "q", 5)]


LAUNCHERS = pytest.mark.parametrize("launcher", [Flat, Nested, installed])


@pytest.fixture
def scratch(monkeypatch):
    """Addresses of the memory that kernels were given, the last alone still there, and sizes."""
    made = []

    def empty_bytes(n, device):
        made.append((n, x := torch.empty(n, dtype=torch.int8, device=device)))
        return x

    monkeypatch.setattr(memory, "empty_bytes", empty_bytes)
    return made


@LAUNCHERS
@pytest.mark.parametrize("size", [0, 96])
def test_a_launch_is_made_again_as_triton_makes_it(driver, scratch, launcher, size):
    """With addresses for tensors and for memory, on the stream that is the current one by then."""
    made = []
    compiled = Compiled(launcher(lambda *given: made.append(given), size))
    a, b, c = (torch.randn(8) for _ in range(3))
    launch = Launch(compiled, 9, TILE, (a, 5, b, None, (), c))
    for x, y, z in [(a, b, c), (c, a, b)]:
        launch.make(x, y, z)
        at = scratch[-1][1].data_ptr() if size else None
        triton.set_allocator(lambda size, *_, at=at: at if size == 9 * 96 else None)
        arguments = (x.data_ptr(), 5, y.data_ptr(), None, (), z.data_ptr())
        launching.run(compiled.run, compiled, 9, 7, arguments)
    as_lists = [[list(a) if type(a) is tuple else a for a in given] for given in made]
    assert as_lists[0::2] == as_lists[1::2]
    assert [n for n, _ in scratch] == ([9 * 96] * 2 if size else [])


def test_a_launch_goes_to_the_stream_that_is_the_current_one_by_then(driver):
    made = []
    streams = iter((7, 8))
    driver.get_current_stream = lambda _: next(streams)
    compiled = Compiled(Flat(lambda *given: made.append(given[3])))
    launch = Launch(compiled, 9, TILE, (x := torch.ones(1),))
    for _ in range(2):
        launch.make(x)
    assert made == [7, 8]


def test_to_ask_a_launcher_leaves_the_allocator_that_was_set(driver):
    triton.set_allocator(launching.scratch)
    assert given(Compiled(Flat(print, 96)), 9) is not None
    assert triton.runtime._allocation._allocator.get() is launching.scratch


class Packing(Flat):
    """Makes something else of the arguments."""

    def __call__(self, *given):
        super().__call__(*given[:9], [*given[9:]])


class Counting(Flat):
    """Looks into the arguments."""

    def __call__(self, *given):
        super().__call__(*given[:9], *(x + 0 for x in given[9:]))


class Silent(Flat):
    """Calls no function of its own."""

    def __call__(self, *given):
        pass


def measuring(launch):
    """As under a profiler that wants memory."""
    launcher = installed(launch)
    launcher.profile_scratch_size = 8
    return launcher


def of_one_piece(launch):
    """Without a function that could be called instead."""
    return lambda *_: launch


@pytest.mark.parametrize("launcher", [Packing, Counting, Silent, measuring, of_one_piece])
def test_a_launcher_that_cannot_be_asked_is_called_each_time(driver, monkeypatch, launcher):
    made = []
    monkeypatch.setattr(launching, "start", lambda *given: made.append(given))
    compiled = Compiled(launcher(print))
    x, y = torch.ones(1), torch.ones(1)
    Launch(compiled, 9, TILE, (x, 5)).make(y)
    assert made == [(compiled, 9, TILE, [y, 5])]


def test_hooks_are_told_of_launches_that_are_made_again(driver, monkeypatch):
    made = []
    compiled = Compiled(Flat(lambda *given: made.append(given)))
    launch = Launch(compiled, 9, TILE, (torch.ones(1), 5))
    monkeypatch.setattr(triton.knobs.runtime.launch_enter_hook, "calls", [lambda _: None])
    launch.make(x := torch.ones(1))
    assert compiled.ran == [((9, 1, 1), x, 5)]
    assert not made


LAYOUT = (2, 4, 3, 8), (96, 8, 32, 1), torch.bfloat16


def test_memory_on_a_card_comes_past_the_dispatcher(monkeypatch):
    """With what torch has for it on the CPU: an inference tensor where others would be."""
    monkeypatch.setattr(memory, "_EMPTY_ON_CARD", guards._empty_strided_cpu)
    modes = torch.no_grad(), torch.inference_mode()
    for mode, is_inference in zip(modes, (False, True), strict=True):
        with mode:
            x = memory.empty(*LAYOUT, torch.device("cuda", 0))
        assert layout(x) == LAYOUT
        assert x.is_inference() == is_inference
    assert layout(memory.empty_bytes(5, torch.device("cuda", 0))) == ((5,), (1,), torch.int8)


def test_memory_that_torch_has_no_other_way_to_comes_through_the_dispatcher(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "empty_strided", lambda *given, **more: asked.append((given, more)))
    monkeypatch.setattr(memory, "_EMPTY_ON_CARD", None)
    for device in (torch.device("cuda", 0), torch.device("cpu")):
        memory.empty(*LAYOUT, device)
    size, stride, dtype = LAYOUT
    expected = [{"dtype": dtype, "device": torch.device(x)} for x in ("cuda:0", "cpu")]
    assert asked == [((size, stride), more) for more in expected]


def test_only_another_card_is_made_the_current_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert isinstance(launching.on(torch.device("cuda", 0)), torch.cuda.device)
    for device in ("cuda:1", "cpu"):
        assert isinstance(launching.on(torch.device(device)), nullcontext)
