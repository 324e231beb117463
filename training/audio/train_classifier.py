"""Train the classifier that judges the demo's samples, on real sounds alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from smoothcache.demo.classifier import save_classifier
from smoothcache.demo.tone_classifier import ToneClassifier
from smoothcache.demo.tones import generate
from training.common import Run, parser, random_rows


def main() -> None:
    """Train, then save the classifier to `<out>/final`."""
    options = parser(__doc__, steps=500, batch=32, lr=2e-3, out="audio/classifier")
    options.add_argument("--pool", type=int, default=1500, help="number of training sounds")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    waveforms, attributes = generate(args.pool, seed=args.seed)
    model = ToneClassifier().to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.02)
    run = Run(args, {"classifier": model}, optimizer)
    for step in run:
        rows = random_rows(waveforms, args.batch_size)
        batch = _disturbed(waveforms[rows]).to(args.device)
        wanted = attributes[rows].to(args.device).unbind(1)
        loss = sum(
            F.cross_entropy(logits, labels, label_smoothing=0.05)
            for logits, labels in zip(model(batch), wanted, strict=True)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            run.record(loss=loss.item())
    save_classifier(model, args.out / "final")


def _disturbed(waveforms: torch.Tensor) -> torch.Tensor:
    """The batch [n, 1, samples] at random loudness, over coloured noise between -70 and -25 dB."""
    n = len(waveforms)
    loudness = 0.6 + 0.8 * torch.rand(n, 1, 1)
    spectra = torch.fft.rfft(torch.randn(waveforms.shape))
    slope = torch.rand(n, 1, 1) / 2  # from white to pink
    coloured = torch.fft.irfft(spectra / torch.arange(1, spectra.shape[-1] + 1) ** slope)
    level = 10 ** (-3.5 + 2.25 * torch.rand(n, 1, 1))
    return loudness * waveforms + level * coloured / coloured.std(dim=-1, keepdim=True)


if __name__ == "__main__":
    main()
