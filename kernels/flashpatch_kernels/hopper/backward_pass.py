"""Backward on Hopper: which kernels give the gradients of a call.

One kernel gives those of k and v, and adds up that of q in memory. Additions take as long as
products where heads are wide, and come in no fixed order unless programs wait for each other, which
they do under full and causal masks and narrow windows only: else another kernel gives the gradient
of q, from products that are computed twice.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashpatch_kernels import triton as portable
from flashpatch_kernels import tuning
from flashpatch_kernels.hopper import biases, crews, learnt
from flashpatch_kernels.hopper.joint_gradients import joint_kernel
from flashpatch_kernels.hopper.key_gradients import key_kernel
from flashpatch_kernels.hopper.query_gradients import query_kernel
from flashpatch_kernels.masks import Band
from flashpatch_kernels.options import Options
from flashpatch_kernels.triton import launching, plans, setups, terms, tile_lists
from flashpatch_kernels.triton.stats import Shared, compute_stats
from flashpatch_kernels.triton.term_gradients import table_gradient, term_gradients


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    options: Options,
    needs: frozenset[str],
) -> dict[str, Tensor]:
    """The gradients that `needs` names, those of q, k and v laid out as these.

    What these kernels do not compute the portable ones do: other head sizes, rows that the copy
    engine cannot read, the gradient of slopes, and that of a table that is constant beyond its ends
    where these kernels do not sum what lies there.
    """
    same = torch.are_deterministic_algorithms_enabled()
    plan, (q, k, v, dout, out), given = plans.plan_of(
        joint_kernel, (q, k, v, dout, out), (lse, dlse), options, needs, same
    )
    with launching.on(q.device):
        known = plan.again(*given)
        if known is not None:
            return dict(zip(sorted(needs), known, strict=True))
        inputs = (q, k, v, dout)
        written = {"q"} & needs | ({"k", "v"} if {"k", "v"} & needs else set())
        steps = plan.steps(*given)
        grads = {
            name: steps.own(torch.empty_like(x))
            for name, x in zip("qkv", inputs[:3], strict=True)
            if name in written
        }
        call = setups.Setup.of(q, k, v, (out, dout, *grads.values()), options)
        joint = tuning.crew("dqdkdv", *call.head_sizes) is not None
        in_one = joint and len(grads) == 3 and (not same or has_order(call))
        fitting = tuning.crew("dkdv", *call.head_sizes) is not None
        sums = learnt.Sums()
        if fitting and "k" in grads:
            _, fixed = crews.tuned(call, "dqdkdv" if in_one else "dkdv")
            sums = learnt.sums_of(call, steps, fixed, needs)
        served = (
            fitting
            and call.unit > 1
            and bool(grads)
            and "slopes" not in needs
            and not ("table" in needs and call.clamped and sums.ends is None)
        )
        if not served:
            return portable.backward(dout, dlse, q, k, v, out, lse, options, needs)
        stats = steps.own(lse.new_empty(2, *lse.shape))
        by_sums = {"bias", "table"} & needs
        added = terms.terms_of(call, steps, both=False) if by_sums else terms.NO_TERMS
        shared = Shared(call, added, inputs, call.strides(*inputs), stats, steps)
        compute_stats(shared, out, lse.contiguous(), None if dlse is None else dlse.contiguous())
        of_queries = "q" in grads and not in_one
        added = biases.added_of(call, steps, of_queries=of_queries, of_keys="k" in grads)
        work = Work(shared, added, sums)
        if in_one:
            launch_joint(work, grads, in_order=same)
        else:
            if "k" in grads:
                launch_keys(work, grads, joint)
            if "q" in grads:
                launch_queries(work, grads["q"])
        if sums.bias is not None:
            grads["bias"] = learnt.bias_gradient(shared, options.bias, sums.bias)
        if sums.ends is not None:
            # Near its ends each distance is summed; those beyond belong to the entries there.
            grads["table"] = table_gradient(shared, options.table, sums.ends, crews.PART)
        grads |= term_gradients(shared, None, needs - grads.keys())
        found = {name: grads[name] for name in sorted(needs)}
        plan.keep(steps, *found.values())
    return found


def has_order(call: setups.Setup) -> bool:
    """Whether programs that add to dQ have an order in which they hardly wait, see `ordering`.

    Under windows that are wide for the keys, those at an end of the keys are far out of step. Where
    queries see only what is ahead, no tile of keys meets the 2t-th of queries, with which it would
    begin, and each waits for the next.
    """
    mask, (*_, n_queries, n_keys) = call.options.mask, call.sizes
    if not isinstance(mask, Band) or n_queries < n_keys:
        return False
    if mask.left is None:
        return True
    if mask.right is None or mask.left < mask.offset:
        return False
    return 2 * (mask.left + mask.right) <= n_keys


class Work(NamedTuple):
    """What this engine's launches of one backward pass share.

    Attributes:
        shared: With the portable kernels.
        added: What is added to scores.
        more: What a kernel whose programs own keys sums beside gradients.
    """

    shared: Shared
    added: biases.Added
    more: learnt.Sums


def launch_joint(work: Work, grads: dict[str, Tensor], *, in_order: bool) -> None:
    """The gradients of k and v, and that of q out of a sum in memory."""
    shared, _, more = work
    steps = shared.steps
    sums = steps.own(torch.empty_like(grads["q"], dtype=torch.float32))
    steps.do(Tensor.zero_, sums)
    strides = [stride // 4 for stride in setups.strides(sums)]
    counts = None
    if in_order:
        tile, _ = crews.tuned(shared.call, "dqdkdv", in_order=True)
        n_batch, n_heads, _, n_queries, _ = shared.call.sizes
        shape = n_batch, n_heads, setups.cdiv(n_queries, tile.BM) + 1  # see `ordering.count_of`
        counts = steps.own(torch.empty(shape, dtype=torch.int32, device=sums.device))
        steps.do(Tensor.zero_, counts)
    outputs = sums, counts, more.bias, more.ends, grads["k"], grads["v"]
    numbers = [*strides, *more.near]
    launch_key_pass(joint_kernel, "dqdkdv", work, outputs, numbers, in_order=in_order)
    steps.do(partial(scaled, shared.call.options.scale), sums, grads["q"])


def scaled(factor: float, x: Tensor, out: Tensor) -> None:
    """Writes x times a factor."""
    torch.mul(x, factor, out=out)


def launch_keys(work: Work, grads: dict[str, Tensor], joint: bool) -> None:
    """The gradients of k and v, by what of the joint kernel is for them, or by one of their own."""
    more = work.more
    outputs = more.bias, more.ends, grads["k"], grads["v"]
    if joint:
        numbers = [0, 0, 0, *more.near]
        launch_key_pass(joint_kernel, "dkdv", work, (None, None, *outputs), numbers)
    else:
        launch_key_pass(key_kernel, "dkdv", work, outputs, [*more.near])


def launch_key_pass(
    kernel: Any,
    name: tuning.CrewPass,
    work: Work,
    outputs: tuple[Any, ...],
    numbers: list[int],
    *,
    in_order: bool = False,
) -> None:
    """A kernel whose programs own keys; `numbers` are what it takes beside all tensors' strides.

    They run together where they add in one order, and so wait for each other.
    """
    shared, added, _ = work
    call, composed = shared.call, added.composed
    n_batch, n_heads, group, n_queries, n_keys = call.sizes
    tile, fixed = crews.tuned(call, name, in_order=in_order)
    n_tiles = setups.cdiv(n_keys, tile.BN)
    shared.steps.launch(
        kernel,
        crews.programs(call, name, n_tiles * n_batch * (n_heads // group)),
        tile._replace(together=True) if in_order else tile,
        *(*shared.inputs, shared.stats, *outputs),
        *(*shared.strides, *call.strides(*outputs[-2:]), *numbers),
        *(*call.sizes, n_tiles, float(call.options.scale), crews.to_log2(call)),
        *call.mask.arguments(
            tile_lists.query_lists(shared.steps, call.mask, tile, group, n_queries, n_keys)
        ),
        *(*call.cap, added.bias, added.tables[1], added.unit, composed.pointers, *added.numbers),
        *(call.mask.rows, call.mask.seen, call.mask.queries, call.mask.has_runs),
        *(composed.opens, composed.adds, composed.code, fixed),
    )


def launch_queries(work: Work, dq: Tensor) -> None:
    """The gradient of q."""
    shared, added, _ = work
    call, composed = shared.call, added.composed
    n_batch, n_heads, _, n_queries, n_keys = call.sizes
    tile, fixed = crews.tuned(call, "dq")
    n_tiles = setups.cdiv(n_queries, tile.BM)
    shared.steps.launch(
        query_kernel,
        crews.programs(call, "dq", n_tiles * n_batch * n_heads),
        tile,
        *(*shared.inputs, shared.stats, dq),
        *(*shared.strides, *call.strides(dq)),
        *(*call.sizes, n_tiles, float(call.options.scale), crews.to_log2(call)),
        *call.mask.arguments(
            tile_lists.key_tiles(shared.steps, call.mask, tile, fixed.R, n_queries, n_keys)
        ),
        *(*call.cap, added.bias, added.tables[0], added.unit, composed.pointers, *added.numbers),
        *(call.mask.rows, call.mask.seen, crews.keys_of(call.mask), call.mask.has_runs),
        *(composed.opens, composed.adds, composed.code, fixed),
    )
