"""Train the autoencoder that the diffusion transformer's latents come from.

Sounds of 16384 samples become latents of 8x128, scaled to unit power: the scheduler of Stable
Audio expects it, and its pipeline knows no factor between autoencoder and transformer.
"""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from diffusers import AutoencoderOobleck
from shared import Run, parser, random_rows
from torch import Tensor, nn

from smoothcache.demo.tones import SAMPLING_RATE, generate

CROP = 4096  # samples; the autoencoder is a convolution and never sees more than this at once
RESOLUTIONS = (1024, 512, 128)  # samples a window


def new_autoencoder() -> AutoencoderOobleck:
    """An untrained autoencoder that makes one latent frame of 128 samples."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*weight_norm", FutureWarning)
        return AutoencoderOobleck(
            encoder_hidden_size=16,
            downsampling_ratios=[8, 4, 4],
            channel_multiples=[1, 2, 4],
            decoder_channels=16,
            decoder_input_channels=8,
            audio_channels=1,
            sampling_rate=SAMPLING_RATE,
        )


def magnitudes(waveforms: Tensor, window: int) -> Tensor:
    """Short-time spectra of waveforms [n, 1, samples]: magnitudes [n, frequencies, frames]."""
    shape = torch.hann_window(window, device=waveforms.device)
    spectra = torch.stft(
        waveforms.flatten(1), window, window // 4, window=shape, return_complex=True
    )
    return (spectra.real.square() + spectra.imag.square() + 1e-8).sqrt()


def spectral_loss(rebuilt: Tensor, waveforms: Tensor) -> Tensor:
    """Distance of the spectra, of their logarithms and relative, over all resolutions; 0-d."""
    losses = []
    for window in RESOLUTIONS:
        ours, theirs = magnitudes(rebuilt, window), magnitudes(waveforms, window)
        floor = 1e-2
        losses.append(((ours + floor).log() - (theirs + floor).log()).abs().mean())
        losses.append((ours - theirs).norm() / theirs.norm())
    return torch.stack(losses).mean()


def losses(vae: AutoencoderOobleck, waveforms: Tensor, kl_weight: float) -> tuple[Tensor, Tensor]:
    """Total loss and the mean absolute error of the waveform, both 0-d."""
    posterior = vae.encode(waveforms).latent_dist
    rebuilt = vae.decode(posterior.sample()).sample
    error = F.l1_loss(rebuilt, waveforms)
    loss = spectral_loss(rebuilt, waveforms) + 5 * error
    return loss + kl_weight * posterior.kl(), error


def random_crops(waveforms: Tensor) -> Tensor:
    """A window of each waveform, at random places: [n, 1, CROP]."""
    starts = torch.randint(waveforms.shape[-1] - CROP + 1, (len(waveforms),)).tolist()
    crops = [
        sound[:, start : start + CROP] for sound, start in zip(waveforms, starts, strict=True)
    ]
    return torch.stack(crops)


@torch.no_grad()
def standardise(vae: AutoencoderOobleck, waveforms: Tensor) -> None:
    """Bring every latent channel to unit power, without changing what is rebuilt."""
    power = vae.encode(waveforms).latent_dist.mode().square().mean((0, 2)).sqrt()
    last, first = vae.encoder.conv2, vae.decoder.conv1
    last.weight_g[: len(power)] /= power[:, None, None]
    last.bias[: len(power)] /= power
    weight = _weight(first) * power[None, :, None]
    first.weight_v.copy_(weight)
    first.weight_g.copy_(weight.norm(dim=(1, 2), keepdim=True))


def _weight(layer: nn.Conv1d) -> Tensor:
    """What a weight-normalised convolution multiplies with."""
    direction: Tensor = layer.weight_v
    return layer.weight_g * direction / direction.norm(dim=(1, 2), keepdim=True)


def main() -> None:
    """Train, then save the autoencoder to `<out>/final`."""
    options = parser(__doc__, steps=6000, batch=8, lr=3e-3, out="autoencoder")
    options.add_argument("--kl-weight", type=float, default=2e-3)
    options.add_argument("--pool", type=int, default=4000, help="number of training sounds")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    waveforms, _ = generate(args.pool, seed=args.seed)
    vae = new_autoencoder().to(args.device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.lr, betas=(0.8, 0.99))
    run = Run(args, {"vae": vae}, optimizer)
    for step in run:
        batch = random_crops(waveforms[random_rows(waveforms, args.batch_size)]).to(args.device)
        loss, error = losses(vae, batch, args.kl_weight)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0:
            run.record(loss=loss.item(), error=error.item())
    held_out = generate(128, seed=args.seed + 1)[0].to(args.device)
    standardise(vae.eval(), held_out)
    with torch.no_grad():
        latents = vae.encode(held_out).latent_dist.mode()
        rebuilt = vae.decode(latents).sample
        print(f"held-out spectral loss {spectral_loss(rebuilt, held_out):.3f}")
    print(f"absolute error {F.l1_loss(rebuilt, held_out):.4f} of {held_out.abs().mean():.4f}")
    vae.save_pretrained(args.out / "final")


if __name__ == "__main__":
    main()
