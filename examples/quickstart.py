"""Patches a model, prints what runs where, and shows that it computes the same.

python examples/quickstart.py
"""

import inspect
import textwrap

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import flashpatch


def batch(texts: list[str]) -> dict[str, Tensor]:
    """One token per byte, padded on the left, as for generation."""
    rows = [torch.tensor(list(text.encode())) for text in texts]
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad(rows, batch_first=True, padding_side="left")
    mask = pad([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def main():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).eval()
    inputs = batch([inspect.getdoc(textwrap) or "", inspect.getsource(textwrap.dedent)])
    real = inputs["attention_mask"].bool()

    before = model(**inputs).logits[real]
    print(flashpatch.apply(model))
    after = model(**inputs).logits[real]
    print(f"largest difference between {real.sum()} real tokens' logits:", end=" ")
    print(f"{(after - before).abs().max():.0e}")

    flashpatch.revert(model)
    again = model(**inputs).logits[real]
    print(f"bit-identical after revert: {'yes' if torch.equal(before, again) else 'no'}")


if __name__ == "__main__":
    main()
