"""Attention classes that are left to transformers on purpose, each with the reason."""

from flashpatch_kernels.engines import Reason

CLAMPED = Reason(
    "CLAMPED", "it cuts its scores off at a least and a largest value before the softmax"
)

LEFT: dict[str, Reason] = {
    "transformers.models.groupvit.modeling_groupvit.GroupViTAssignAttention": Reason(
        "HARD_ASSIGNMENT",
        "each token goes to the one group that claims it most: no softmax over tokens is taken",
    ),
    "transformers.models.grounding_dino.modeling_grounding_dino"
    ".GroundingDinoBiMultiHeadAttention": CLAMPED,
    "transformers.models.mm_grounding_dino.modeling_mm_grounding_dino"
    ".MMGroundingDinoBiMultiHeadAttention": CLAMPED,
    "transformers.models.reformer.modeling_reformer.LSHSelfAttention": Reason(
        "HASHED", "its tokens attend within buckets that they are hashed to, not to the text"
    ),
}
