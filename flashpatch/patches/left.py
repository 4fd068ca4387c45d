"""Attention classes that are left to transformers on purpose, each with the reason."""

from flashpatch_kernels.engines import Reason

LEFT: dict[str, Reason] = {
    "transformers.models.reformer.modeling_reformer.LSHSelfAttention": Reason(
        "HASHED", "its tokens attend within buckets that they are hashed to, not to the text"
    ),
}
