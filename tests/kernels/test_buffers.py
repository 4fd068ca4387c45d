"""Memory that tiles take in turns."""

import torch

from flashpatch_kernels.buffers import Buffers


def test_a_name_is_one_memory_as_large_as_the_largest():
    buffers = Buffers(torch.float32, torch.device("cpu"))
    small = buffers.get("S", (2, 3)).fill_(1)
    large = buffers.get("S", (4, 5))
    assert large.data_ptr() != small.data_ptr()
    assert buffers.get("S", (3, 2)).data_ptr() == large.data_ptr()
    assert buffers.get("P", (3, 2)).data_ptr() != large.data_ptr()
    assert large.dtype == torch.float32


def test_zeros_stay_between_what_tiles_of_one_shape_write(poisoned_memory):
    buffers = Buffers(torch.float32, torch.device("cpu"))
    buffers.zeros("skewed", (2, 3))[:, :2] = 7
    again = buffers.zeros("skewed", (2, 3))
    assert again.tolist() == [[7, 7, 0], [7, 7, 0]]
    for shape in ((3, 2), (2, 3), (4, 4)):
        assert not buffers.zeros("skewed", shape).any()
        buffers.zeros("skewed", shape).fill_(7)
