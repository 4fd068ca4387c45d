"""Trains a small GPT on Python's own standard library, byte by byte, with accelerate.

A script like any other: it does not mention flashpatch. Launched as here, its model is patched:

    accelerate launch --multi_gpu --num_processes 2 -m flashpatch.run examples/train_accelerate.py

Leave out `-m flashpatch.run` and it runs without; the losses it prints are the same. On a machine
without GPUs put `ACCELERATE_USE_CPU=true` in front, and the processes talk through gloo.
"""

import argparse
import sysconfig
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset
from transformers import GPT2Config, GPT2LMHeadModel


class Passages(Dataset[Tensor]):
    """Passages of the standard library's sources, one token per byte."""

    def __init__(self, length: int) -> None:
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        text = b"\n\n".join(file.read_bytes() for file in files)
        self.tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self.length = length

    def __len__(self) -> int:
        return len(self.tokens) // self.length

    def __getitem__(self, index: int) -> Tensor:
        return self.tokens[index * self.length : (index + 1) * self.length].long()


def main():
    parser = argparse.ArgumentParser(description="Trains a small GPT on the standard library.")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--length", type=int, default=512, help="tokens of a passage")
    parser.add_argument("--batch", type=int, default=4, help="passages per process and step")
    parser.add_argument("--lr", type=float, default=2e-3)
    arguments = parser.parse_args()

    accelerator = Accelerator()
    set_seed(0)
    config = GPT2Config(
        vocab_size=256,
        n_positions=arguments.length,
        n_embd=128,
        n_layer=2,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.lr)
    loader = DataLoader(Passages(arguments.length), batch_size=arguments.batch, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    accelerator.print(f"training on {accelerator.num_processes} processes")
    for step, tokens in zip(range(1, arguments.steps + 1), loader, strict=False):
        logits = model(input_ids=tokens).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step == 1 or step % 10 == 0:
            mean = torch.as_tensor(accelerator.reduce(loss.detach(), "mean"))
            accelerator.print(f"step {step:4d}  loss {mean.item():.4f}")
    # let go of the model first: torch may hang when it outlives the processes' connection
    model, optimizer, loader = accelerator.free_memory(model, optimizer, loader)
    accelerator.end_training()


if __name__ == "__main__":
    main()
