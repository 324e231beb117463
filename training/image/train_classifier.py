"""Train the classifier that judges the demo's samples, on real images alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from smoothcache.demo.classifier import ShapeClassifier, save_classifier
from smoothcache.demo.shapes import generate
from training.common import Run, parser, random_rows


def main() -> None:
    """Train, then save the classifier to `<out>/final`."""
    options = parser(__doc__, steps=5000, batch=64, lr=2e-3, out="image/classifier")
    options.add_argument("--pool", type=int, default=40000, help="number of training images")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    images, labels = generate(args.pool, seed=args.seed)
    model = ShapeClassifier().to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.02)
    run = Run(args, {"classifier": model}, optimizer)
    for step in run:
        rows = random_rows(images, args.batch_size)
        batch = _turned(images[rows]).to(args.device)
        loss = F.cross_entropy(model(batch), labels[rows].to(args.device), label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            run.record(loss=loss.item())
    save_classifier(model, args.out / "final")


def _turned(images: torch.Tensor) -> torch.Tensor:
    """The batch [n, 3, h, w] randomly mirrored and turned by a multiple of 90 degrees."""
    if torch.rand(()) < 0.5:
        images = images.flip(-1)
    return images.rot90(int(torch.randint(4, ())), (-2, -1))


if __name__ == "__main__":
    main()
