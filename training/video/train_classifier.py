"""Train the classifier that judges the demo's clips, on real clips alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from smoothcache.demo.classifier import save_classifier
from smoothcache.demo.clip_classifier import ClipClassifier
from smoothcache.demo.clips import ATTRIBUTES, generate
from training.common import Run, parser, random_rows


def main() -> None:
    """Train, then save the classifier to `<out>/final`."""
    options = parser(__doc__, steps=800, batch=32, lr=3e-3, out="video/classifier")
    options.add_argument("--pool", type=int, default=4000, help="number of training clips")
    options.add_argument("--noise", type=float, default=0.1, help="added to the clips, at most")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    clips, labels = generate(args.pool, seed=args.seed)
    model = ClipClassifier().to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.02)
    run = Run(args, {"classifier": model}, optimizer)
    for step in run:
        rows = random_rows(clips, args.batch_size)
        batch = clips[rows] + args.noise * torch.rand(()) * torch.randn(clips[rows].shape)
        logits, wanted = model(batch.to(args.device)), labels[rows].to(args.device)
        losses = [F.cross_entropy(logits[name], wanted[:, i]) for i, name in enumerate(ATTRIBUTES)]
        loss = torch.stack(losses).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            run.record(loss=loss.item())
    save_classifier(model, args.out / "final")


if __name__ == "__main__":
    main()
