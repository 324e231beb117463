"""Make the autoencoder that the diffusion transformer's latents come from, and train its decoder.

Sounds of 16384 samples become latents of 32x64, of unit power on average: the scheduler of Stable
Audio expects it, and its pipeline knows no factor between autoencoder and transformer. The encoder
projects blocks of 256 samples on their principal components and stays as it is, so that the
transformer can be trained at the same time as the decoder.
"""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from diffusers import AutoencoderOobleck
from torch import Tensor, nn

from smoothcache.demo.tones import SAMPLING_RATE, generate
from smoothcache.metrics.audio import signal_to_noise_ratio
from training.common import Run, parser, random_rows

LATENT_CHANNELS, BLOCK = 32, 256
CROP = 16  # frames; the decoder is a convolution and is never shown more than this at once
RESOLUTIONS = (1024, 512, 128)  # samples a window


def new_autoencoder(waveforms: Tensor) -> AutoencoderOobleck:
    """An autoencoder that makes one latent frame of 256 samples, and starts from a good guess.

    The encoder projects blocks on the principal components of the data [n, 1, samples], and
    nothing else. The decoder starts as the way back, with residual branches near zero and
    activations near the identity. From the usual start nothing is learned in the first thousand
    steps.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*weight_norm", FutureWarning)
        vae = AutoencoderOobleck(
            encoder_hidden_size=2 * LATENT_CHANNELS,
            downsampling_ratios=[8, 4, 8],
            channel_multiples=[1, 1, 2],
            decoder_channels=24,
            decoder_input_channels=LATENT_CHANNELS,
            audio_channels=1,
            sampling_rate=SAMPLING_RATE,
        )
    with torch.no_grad():
        for part, residual, linearity in ((vae.encoder, 0.0, 10), (vae.decoder, 0.1, 3)):
            for module in part.modules():
                if hasattr(module, "snake2"):  # the end of a residual branch
                    module.conv2.weight_g *= residual
                if hasattr(module, "beta"):
                    module.beta += linearity
                if getattr(module, "bias", None) is not None:
                    module.bias.zero_()
        start_from_components(vae, waveforms)
        standardise(vae, waveforms)
    vae.encoder.requires_grad_(False)
    return vae


@torch.no_grad()
def encode(vae: AutoencoderOobleck, waveforms: Tensor) -> Tensor:
    """Latents [n, channels, frames] of waveforms [n, 1, samples], as the encoder gives them.

    The encoder is linear and looks at one block at a time, so its answers to impulses tell all.
    """
    impulses = torch.eye(BLOCK).reshape(1, 1, -1)  # one in every block, each at a place of its own
    answers = vae.encode(impulses.to(vae.device)).latent_dist.mode()[0].T.cpu()
    return (waveforms[:, 0].unflatten(1, (-1, BLOCK)) @ answers).transpose(1, 2).contiguous()


def start_from_components(vae: AutoencoderOobleck, waveforms: Tensor) -> None:
    """Makes the encoder project blocks on their principal components, and the decoder go back."""
    encoder, decoder = vae.encoder, vae.decoder
    set_weight(encoder.conv1, torch.ones(1, 1), tap=3, rest=0.0)
    analysis, frames = torch.ones(1, 1), waveforms
    for block in encoder.block:
        basis, frames = components(frames, block.conv1.stride[0], block.conv1.out_channels)
        set_weight(block.conv1, basis, rest=0.0)
        analysis = basis.transpose(1, 2).flatten(1) @ torch.kron(
            torch.eye(basis.shape[2]), analysis
        )
    # The components come in the order of their power: the first ones become the latents.
    set_weight(encoder.conv2, torch.eye(LATENT_CHANNELS, frames.shape[1]), tap=1, rest=0.0)
    encoder.conv2.bias[LATENT_CHANNELS:] -= 4

    synthesis, frames = torch.ones(1, 1), waveforms
    for block in reversed(decoder.block):
        basis, frames = components(frames, block.conv_t1.stride[0], block.conv_t1.in_channels)
        set_weight(block.conv_t1, basis)
        synthesis = basis.transpose(1, 2).flatten(1) @ torch.kron(
            torch.eye(basis.shape[2]), synthesis
        )
    set_weight(decoder.conv1, synthesis @ analysis[:LATENT_CHANNELS].T, tap=3)
    set_weight(decoder.conv2, torch.ones(1, 1), tap=3)


def components(frames: Tensor, stride: int, most: int) -> tuple[Tensor, Tensor]:
    """Principal components of blocks of `stride` frames, and the frames that they make.

    Args:
        frames: [n, channels, length].
        stride: Frames of a block.
        most: Largest number of components.

    Returns:
        Orthonormal components [components, channels, stride], the most powerful first, and
        the blocks in terms of them [n, components, length / stride].
    """
    channels = frames.shape[1]
    blocks = frames.unflatten(2, (-1, stride)).permute(0, 2, 3, 1).flatten(2)
    flat = blocks.flatten(0, 1)
    _, vectors = torch.linalg.eigh(flat.T @ flat)
    basis = vectors.flip(1)[:, :most].T
    return basis.unflatten(1, (stride, channels)).transpose(1, 2), (blocks @ basis.T).transpose(
        1, 2
    )


def set_weight(
    layer: nn.Module, weight: Tensor, tap: int | None = None, rest: float = 0.02
) -> None:
    """Puts a weight into the first channels of a weight-normalised convolution.

    Args:
        layer: The convolution.
        weight: [out, in] at one tap; or [out, in, stride], for a block of a strided convolution.
            For a transposed one `in` and `out` change places.
        tap: Where to put it; None puts it in the middle.
        rest: Factor for the random weights that are not set.
    """
    values = rest * layer.weight_v
    rows, columns = weight.shape[:2]
    if tap is None:
        first = weight.shape[2] // 2
        values[:rows, :columns, first : first + weight.shape[2]] = weight
    else:
        values[:rows, :columns, tap] = weight
    layer.weight_g.copy_(values.norm(dim=(1, 2), keepdim=True))
    layer.weight_v.copy_(torch.where(layer.weight_g == 0, layer.weight_v, values))


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


def losses(vae: AutoencoderOobleck, latents: Tensor, waveforms: Tensor) -> tuple[Tensor, Tensor]:
    """Total loss and the absolute error of the waveform over its absolute value, both 0-d.

    A little noise on the latents makes the decoder indifferent to the transformer's mistakes.
    """
    noisy = latents + 0.1 * torch.rand(()) * torch.randn(latents.shape).to(latents.device)
    rebuilt = vae.decode(noisy).sample
    error = F.l1_loss(rebuilt, waveforms)
    return spectral_loss(rebuilt, waveforms) + 10 * error, error / waveforms.abs().mean()


def random_crops(latents: Tensor, waveforms: Tensor) -> tuple[Tensor, Tensor]:
    """A window of each sound, at random places: [n, channels, CROP], [n, 1, BLOCK * CROP]."""
    starts = torch.randint(latents.shape[-1] - CROP + 1, (len(latents),)).tolist()
    frames = [x[:, start : start + CROP] for x, start in zip(latents, starts, strict=True)]
    samples = [
        x[:, BLOCK * start : BLOCK * (start + CROP)]
        for x, start in zip(waveforms, starts, strict=True)
    ]
    return torch.stack(frames), torch.stack(samples)


@torch.no_grad()
def standardise(vae: AutoencoderOobleck, waveforms: Tensor) -> None:
    """Bring the latents to unit power on average, without changing what is rebuilt.

    Channels come half way to equal power, in dB: left as they are, all but the first few would
    drown in the last noise of sampling; made equal, rare detail would count as much as the notes.
    """
    own = encode(vae, waveforms).square().mean((0, 2)).sqrt()
    factor = own.rsqrt() / own.mean().sqrt()
    last, first = vae.encoder.conv2, vae.decoder.conv1
    last.weight_g[: len(own)] *= factor[:, None, None]
    last.bias[: len(own)] *= factor
    weight = _weight(first) / factor[None, :, None]
    first.weight_v.copy_(weight)
    first.weight_g.copy_(weight.norm(dim=(1, 2), keepdim=True))


def _weight(layer: nn.Conv1d) -> Tensor:
    """What a weight-normalised convolution multiplies with."""
    direction: Tensor = layer.weight_v
    return layer.weight_g * direction / direction.norm(dim=(1, 2), keepdim=True)


def main() -> None:
    """Train, then save the autoencoder to `<out>/final`."""
    options = parser(__doc__, steps=1000, batch=8, lr=1e-3, out="audio/autoencoder")
    options.add_argument("--pool", type=int, default=500, help="number of training sounds")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    waveforms, _ = generate(args.pool, seed=args.seed)
    vae = new_autoencoder(waveforms[:200]).to(args.device)
    latents = encode(vae, waveforms)
    vae.save_pretrained(args.out / "start")
    optimizer = torch.optim.AdamW(vae.decoder.parameters(), lr=args.lr, betas=(0.8, 0.99))
    run = Run(args, {"vae": vae}, optimizer)
    seen: list[tuple[float, float]] = []
    for step in run:
        rows = random_rows(waveforms, args.batch_size)
        batch = (x.to(args.device) for x in random_crops(latents[rows], waveforms[rows]))
        loss, error = losses(vae, *batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.decoder.parameters(), 1.0)
        optimizer.step()
        seen.append((loss.item(), error.item()))
        if step % 20 == 0:
            mean_loss, mean_error = torch.tensor(seen).mean(dim=0).tolist()
            run.record(loss=mean_loss, error=mean_error)
            seen.clear()
    held_out = generate(32, seed=args.seed + 1)[0]
    with torch.no_grad():
        rebuilt = vae.decode(encode(vae, held_out).to(args.device)).sample.cpu()
        ratio = signal_to_noise_ratio(rebuilt, held_out).mean()
        print(f"held out: {ratio:.1f} dB, spectral loss {spectral_loss(rebuilt, held_out):.3f}")
    vae.save_pretrained(args.out / "final")


if __name__ == "__main__":
    main()
