"""Engine `hopper`: warp-specialised kernels in Gluon for NVIDIA's Hopper cards.

It shares masks and terms with engine `triton`, whose records and device functions it uses, and
differs in how a program works: `rings` bring tiles from the warps that read to those that compute,
`scheduling` says who works on what and when, `crews` how many warps there are of each kind.
"""

from flashpatch_kernels.hopper.backward_pass import backward
from flashpatch_kernels.hopper.forward_pass import forward

__all__ = ["backward", "forward"]
