"""What the tests of the Hopper engine on a card call, and which of its kernels serve the calls."""

from dataclasses import replace

import torch

from flashpatch_kernels.op import run

DEVICE = "cuda"
DTYPES = [torch.float16, torch.bfloat16]
FORWARD, JOINT, KEYS, QUERIES = "forward_kernel", "joint_kernel", "key_kernel", "query_kernel"
# Which of the engine's own kernels give all gradients; where there are none, portable ones do.
TOGETHER, APART = [FORWARD, JOINT], [FORWARD, KEYS, QUERIES]
# Head sizes, what serves them, and what does with gradients that are the same every time where
# programs have no order in which they add to dQ.
SIZES = {64: TOGETHER, 128: TOGETHER, 256: APART}
UNORDERED = {64: [*TOGETHER, QUERIES], 128: [*TOGETHER, QUERIES], 256: APART}


def attend(q, k, v, options):
    return run(q, k, v, options, "hopper")


def spread(x):
    """The same numbers in memory whose gaps, and what follows, are NaN."""
    b, h, n, d = x.shape
    whole = x.new_full((b, n + 3, h, d + 8), torch.nan)
    whole[:, :n, :, :d] = x.detach().transpose(1, 2)
    return whole[:, :n, :, :d].transpose(1, 2).requires_grad_(x.requires_grad)


def many(one, batch, heads, kv_heads):
    """A sample with other tensors, of more heads and rows of the batch, and the same mask."""
    _, _, n, d = one.q.shape

    def random(heads, length):
        return spread(torch.randn(batch, heads, length, d, device=DEVICE).to(one.q.dtype))

    torch.manual_seed(0)
    q, k, v = random(heads, n), *(random(kv_heads, one.k.shape[2]) for _ in range(2))
    dlse = torch.randn(batch, heads, n, device=DEVICE)
    inputs = {name: x.requires_grad_() for name, x in (("q", q), ("k", k), ("v", v))}
    return replace(one, **inputs, dout=random(heads, n), dlse=dlse)


def own_kernels():
    from flashpatch_kernels.hopper import backward_pass, forward_pass

    apart = backward_pass.key_kernel, backward_pass.query_kernel
    return forward_pass.forward_kernel, backward_pass.joint_kernel, *apart
