"""Fine-tunes a T5 to put the vowels back into lines of Python's standard library.

python examples/finetune_t5.py
python examples/finetune_t5.py --model google/byt5-small  # start from trained weights

Before it trains, it takes one step on a long document with encoder and decoder switched separately:
each time the relative position biases get the same gradient, in less or more memory.
"""

import argparse
import random
import re
import sysconfig
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, T5Config, T5ForConditionalGeneration

import flashpatch

PAD, END, SPECIAL = 0, 1, 3  # ByT5's vocabulary: three special tokens, then the 256 bytes


def stdlib_lines() -> list[str]:
    """Lines of the standard library's sources that read like sentences."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    lines = (line.strip() for file in files for line in file.read_text("utf-8").splitlines())
    return [line for line in lines if re.fullmatch(r"[A-Za-z][A-Za-z ,']{24,60}\.", line)]


def encode(texts: list[str]) -> tuple[Tensor, Tensor]:
    """Token ids and the mask of a padded batch."""
    rows = [torch.tensor([byte + SPECIAL for byte in text.encode()] + [END]) for text in texts]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    return ids, (ids != PAD).long()


def loss_of(model: T5ForConditionalGeneration, lines: list[str]) -> Tensor:
    """The loss of writing the lines when reading them without their vowels."""
    ids, mask = encode([re.sub("[aeiouAEIOU]", "", line) for line in lines])
    labels, _ = encode(lines)
    labels = labels.masked_fill(labels == PAD, -100)
    return model(input_ids=ids, attention_mask=mask, labels=labels).loss


def megabytes(*, peak: bool) -> float:
    """Memory in use now, or at the peak so far."""
    if torch.cuda.is_available():
        allocated = torch.cuda.max_memory_allocated if peak else torch.cuda.memory_allocated
        return allocated() / 2**20
    # what Linux says of this process; elsewhere unknown
    status = Path("/proc/self/status")
    field = "VmHWM" if peak else "VmRSS"
    found = re.search(rf"{field}:\s+(\d+)", status.read_text()) if status.exists() else None
    return int(found[1]) / 2**10 if found else float("nan")


def compare_one_step(model: T5ForConditionalGeneration, lines: list[str], tokens: int):
    """One step on a long document, with less and less of the model patched, as peaks only grow."""
    document = " ".join(lines)[: tokens - 1]
    biases = {n: p for n, p in model.named_parameters() if "relative_attention_bias" in n}
    print(flashpatch.apply(model))
    loss_of(model, lines[:1]).backward()  # what a first step allocates once and for all
    start = megabytes(peak=False)

    peaks, gradients = {}, {}
    for part, only in {"all": None, "encoder": "encoder.*", "nothing": ()}.items():
        flashpatch.apply(model, only=only)
        model.zero_grad()
        loss_of(model, [document]).backward()
        peaks[part] = megabytes(peak=True) - start
        gradients[part] = {name: bias.grad for name, bias in biases.items()}
    model.zero_grad()
    flashpatch.apply(model)

    print(f"\none step on a document of {tokens} tokens:")
    print("  patched   peak memory   difference of the bias gradients")
    for part, peak in peaks.items():
        expected = gradients["nothing"]
        errors = ((g - expected[n]).norm() / expected[n].norm() for n, g in gradients[part].items())
        print(f"  {part:8} {peak:9.0f} MB   {max(errors):.0e}")
    print()


def train(model: T5ForConditionalGeneration, lines: list[str], steps: int, batch: int):
    choose = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(1, steps + 1):
        loss = loss_of(model, choose.sample(lines, batch))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step == 1 or step % 20 == 0:
            print(f"step {step:4d}  loss {loss.item():.3f}")


def main():
    parser = argparse.ArgumentParser(description="Fine-tunes a T5 to restore vowels.")
    parser.add_argument("--model", help="a ByT5 to start from; by default a small random one")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--document", type=int, default=1024, help="tokens of the long document")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.model:
        model = AutoModelForSeq2SeqLM.from_pretrained(arguments.model)
    else:
        config = T5Config(
            vocab_size=384,
            d_model=128,
            d_kv=32,
            d_ff=256,
            num_layers=2,
            num_heads=8,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
        )
        config.decoder_start_token_id = PAD
        model = T5ForConditionalGeneration(config)
    model.train()

    lines = stdlib_lines()
    print(f"{len(lines)} lines, such as: {lines[0]}")
    compare_one_step(model, lines, arguments.document)
    train(model, lines, arguments.steps, arguments.batch)


if __name__ == "__main__":
    main()
