"""Engine `hopper`: warp-specialised kernels in Gluon for NVIDIA's Hopper cards.

It shares masks and terms with engine `triton`, whose records and device functions it uses, and
differs in how a program works: `rings` bring tiles from the warps that read to those that compute,
`products` are what these multiply, `biases` and a `table` are added, `softmax` comes between a
forward's two products, `weights` are a backward's, whose dS is summed where something is `learnt`,
`scheduling` says who works on what and when, `crews` how many warps there are of each kind.
`backward_pass` chooses among kernels for all gradients, for those of keys and for that of queries.
Gluon changes from one Triton to the next: where one does not compile these kernels, the portable
ones compute the call, and all later ones.
"""

import warnings
from typing import Any

import triton
from triton.compiler.errors import CompilationError

from flashpatch_kernels import triton as portable
from flashpatch_kernels.hopper import backward_pass, forward_pass

__all__ = ["backward", "forward"]

# What a Triton that does not compile the kernels had to say.
_ERRORS: list[CompilationError] = []


def forward(*arguments: Any) -> Any:
    """As the `forward` of every engine."""
    return _compiled(forward_pass.forward, portable.forward, *arguments)


def backward(*arguments: Any) -> Any:
    """As the `backward` of every engine."""
    return _compiled(backward_pass.backward, portable.backward, *arguments)


def _compiled(ours: Any, otherwise: Any, *arguments: Any) -> Any:
    if not _ERRORS:
        try:
            return ours(*arguments)
        except CompilationError as error:
            _ERRORS.append(error)
            told = str(error).strip().splitlines()[-1]
            warnings.warn(
                f"Triton {triton.__version__} does not compile flashpatch's Hopper kernels, the "
                f"portable ones run instead: {told}",
                stacklevel=2,
            )
    return otherwise(*arguments)
