"""Train the text encoder to tell a caption's attributes from its bytes.

The average of its output must give away every attribute to a linear classifier. Trained together
with the transformer it would have to learn the words from the pixels, which takes far longer.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

from smoothcache.demo.clips import ATTRIBUTES, all_labels, caption
from training.common import Run, parser, random_rows


def new_text_encoder(width: int = 64) -> T5EncoderModel:
    """An untrained T5 encoder of two layers over bytes."""
    config = T5Config(
        vocab_size=384,  # bytes and the special tokens of ByT5
        d_model=width,
        d_kv=width // 4,
        d_ff=2 * width,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config)


def encoded_captions(folder: Path) -> tuple[Tensor, Tensor]:
    """All captions in the order of `all_labels`, and last the empty one.

    Returns:
        The encoder's output [captions + 1, tokens, width], and a mask of its tokens.
    """
    tokenizer = ByT5Tokenizer.from_pretrained(folder)
    encoder = T5EncoderModel.from_pretrained(folder).eval()
    texts = [*map(caption, all_labels()), ""]
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        output = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
    return output, tokens.attention_mask


def main() -> None:
    """Train, then save the encoder and its tokenizer to `<out>/final`."""
    args = parser(__doc__, steps=400, batch=48, lr=3e-3, out="video/text_encoder").parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tokenizer = ByT5Tokenizer(extra_ids=0)
    labels = all_labels()
    tokens = tokenizer([caption(row) for row in labels], padding=True, return_tensors="pt")
    encoder = new_text_encoder().to(args.device)
    heads = nn.ModuleList(
        nn.Linear(encoder.config.d_model, len(values)) for values in ATTRIBUTES.values()
    ).to(args.device)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *heads.parameters()], args.lr)
    run = Run(args, {"encoder": encoder, "heads": heads}, optimizer)
    for step in run:
        rows = random_rows(labels, args.batch_size)
        mask = tokens.attention_mask[rows].to(args.device)
        output = encoder(tokens.input_ids[rows].to(args.device), mask).last_hidden_state
        mean = (output * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        wanted = labels[rows].to(args.device)
        losses = [F.cross_entropy(head(mean), wanted[:, i]) for i, head in enumerate(heads)]
        loss = torch.stack(losses).sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0:
            run.record(loss=loss.item())
    print(f"last loss {loss.item():.4f}")
    encoder.save_pretrained(args.out / "final")
    tokenizer.save_pretrained(args.out / "final")


if __name__ == "__main__":
    main()
