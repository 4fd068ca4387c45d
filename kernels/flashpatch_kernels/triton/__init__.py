"""Engine `triton`: forward and backward as Triton kernels, for any GPU that Triton knows.

Two functions, with the contract that every engine has. What makes a score of a product is in
`scores` and `terms`, the gradients of that in `term_gradients`; masks are in `tile_masks` and
`tile_lists`.
"""

from flashpatch_kernels.triton.backward_pass import backward
from flashpatch_kernels.triton.forward_pass import forward

__all__ = ["backward", "forward"]
