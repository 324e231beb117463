"""Train text encoder, projection and transformer, and export the pipeline.

The text encoder learns to tell the captions apart, which takes seconds, and then stays as it is,
as that of Stable Audio does. The transformer predicts the velocity in latents of the autoencoder
(`train_autoencoder.py` first), under the preconditioning of `CosineDPMSolverMultistepScheduler`.
What is exported are running averages of the weights, as a folder that
`StableAudioPipeline.from_pretrained` loads.
"""

from __future__ import annotations

import copy
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderOobleck,
    CosineDPMSolverMultistepScheduler,
    StableAudioDiTModel,
    StableAudioProjectionModel,
)
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from torch import Tensor, nn
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

from smoothcache.demo.tones import NUM_CLASSES, SECONDS, all_attributes, caption, generate
from training.audio.evaluate import FOLDER
from training.audio.export import export_pipeline
from training.audio.train_autoencoder import LATENT_CHANNELS, encode
from training.common import Run, parser, random_rows, update_average

TEXT_LENGTH = 48  # bytes of the longest caption and the mark of its end, and a little more
FRAMES = 64
TEXT_DIM, CONDITION_DIM, HEAD_DIM, HEADS = 64, 96, 24, 4


def new_tokenizer() -> ByT5Tokenizer:
    """Bytes are the tokens, so there is no vocabulary to store."""
    return ByT5Tokenizer(extra_ids=0, model_max_length=TEXT_LENGTH)


def new_scheduler() -> CosineDPMSolverMultistepScheduler:
    """DPM-Solver++ SDE over the noise levels of Stable Audio Open."""
    return CosineDPMSolverMultistepScheduler(
        sigma_min=0.3, sigma_max=500, sigma_data=1.0, solver_order=2
    )


class Denoiser(nn.Module):
    """Everything that is trained: from captions to the velocity of noisy latents."""

    def __init__(self, num_layers: int = 6) -> None:
        super().__init__()
        self.text_encoder = T5EncoderModel(
            T5Config(
                vocab_size=259, d_model=TEXT_DIM, d_kv=16, d_ff=128, num_heads=4, num_layers=2,
                feed_forward_proj="gated-gelu", dropout_rate=0.0,
            )
        )  # fmt: skip
        self.projection_model = StableAudioProjectionModel(
            TEXT_DIM, CONDITION_DIM, min_value=0, max_value=2
        )
        self.transformer = StableAudioDiTModel(
            sample_size=FRAMES,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            num_layers=num_layers,
            attention_head_dim=HEAD_DIM,
            num_attention_heads=HEADS,
            num_key_value_attention_heads=HEADS // 2,
            cross_attention_dim=CONDITION_DIM,
            cross_attention_input_dim=CONDITION_DIM,
            time_proj_dim=64,
            global_states_input_dim=2 * CONDITION_DIM,
        )
        self.transformer.apply(_initialise)
        for block in self.transformer.transformer_blocks:
            for last in (block.attn1.to_out[0], block.attn2.to_out[0], block.ff.net[2]):
                nn.init.zeros_(last.weight)
        nn.init.zeros_(self.transformer.proj_out.weight)
        self.rotary = get_1d_rotary_pos_embed(
            HEAD_DIM // 2, FRAMES + 1, use_real=True, repeat_interleave_real=False
        )

    def forward(
        self, latents: Tensor, times: Tensor, texts: Tensor, mask: Tensor, dropped: Tensor
    ) -> Tensor:
        """Velocity [n, channels, frames], as `StableAudioPipeline` asks for it.

        Args:
            latents: Scaled noisy latents; [n, channels, frames].
            times: In (0, 1); [n].
            texts: What the text encoder makes of the captions; [n, length, dim].
            mask: Which of its tokens are no padding; [n, length].
            dropped: Whose caption is to be left out; boolean, [n].
        """
        texts = self.projection_model(text_hidden_states=texts).text_hidden_states
        seconds = torch.full((len(latents),), SECONDS, device=latents.device)
        span = self.projection_model(start_seconds=0 * seconds, end_seconds=seconds)
        start, end = span.seconds_start_hidden_states, span.seconds_end_hidden_states
        condition = torch.cat([texts * mask[..., None], start, end], dim=1)
        condition = condition * (~dropped)[:, None, None]
        velocity: Tensor = self.transformer(
            latents,
            times,
            encoder_hidden_states=condition,
            global_hidden_states=torch.cat([start, end], dim=2),
            rotary_embedding=self.rotary,
            return_dict=False,
        )[0]
        return velocity


def learn_captions(
    encoder: T5EncoderModel, tokens: Tensor, mask: Tensor, attributes: Tensor, *, steps: int
) -> float:
    """Trains the encoder until every token of a caption tells all of its attributes.

    A transformer that has to learn reading and composing at once does neither for a long time.

    Returns:
        The cross-entropy at the end, in nats, summed over attributes.
    """
    head = nn.Linear(TEXT_DIM, sum(NUM_CLASSES)).to(tokens.device)
    encoder.requires_grad_(True)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=3e-3)
    for _ in range(steps):
        states = encoder(tokens, attention_mask=mask)[0]
        logits = head(states)[mask.bool()].split(NUM_CLASSES, dim=1)
        labels = attributes[:, None].expand(-1, tokens.shape[1], -1)[mask.bool()].unbind(1)
        loss = sum(F.cross_entropy(x, y) for x, y in zip(logits, labels, strict=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    encoder.requires_grad_(False)
    return loss.item()


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def stratified_times(n: int) -> Tensor:
    """Random times in (0.15, 1), one from each of n equal parts; the last noise level is 0.19."""
    return 0.15 + 0.8495 * (torch.randperm(n) + torch.rand(n)) / n


def velocity_loss(
    model: Denoiser, latents: Tensor, texts: Tensor, mask: Tensor, drop: float
) -> Tensor:
    """Mean squared error of the velocity, 0-d, for latents [n, channels, frames].

    At time t the scheduler's noise level is tan(pi t / 2), and what the transformer is given is
    cos(pi t / 2) latents + sin(pi t / 2) noise.
    """
    n = len(latents)
    times = stratified_times(n).to(latents.device)
    noise = torch.randn(latents.shape).to(latents.device)
    angle = (math.pi / 2 * times)[:, None, None]
    noisy = angle.cos() * latents + angle.sin() * noise
    wanted = angle.cos() * noise - angle.sin() * latents
    dropped = (torch.rand(n) < drop).to(latents.device)
    return (model(noisy, times, texts, mask, dropped) - wanted).square().mean()


def caption_tokens(tokenizer: ByT5Tokenizer) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens and masks of every caption, [60, length], and the row of each triple of attributes."""
    combinations = all_attributes()
    texts = tokenizer(
        [caption(attributes) for attributes in combinations],
        padding="max_length",
        max_length=TEXT_LENGTH,
        return_tensors="pt",
    )
    rows = torch.empty(*(combinations.amax(dim=0) + 1).tolist(), dtype=torch.long)
    rows[tuple(combinations.T)] = torch.arange(len(combinations))
    return texts.input_ids, texts.attention_mask, rows


def main() -> None:
    """Train, exporting the averaged weights every few minutes and at the end."""
    options = parser(__doc__, steps=4000, batch=16, lr=2e-3, out="audio/dit")
    options.add_argument(
        "--vae",
        type=Path,
        default=Path("runs/audio/autoencoder/final"),
        help="the encoder is the same from the start: `start` beside it will do for training",
    )
    options.add_argument("--pool", type=int, default=1500, help="number of training sounds")
    options.add_argument("--drop", type=float, default=0.1, help="share of sounds without caption")
    options.add_argument("--reading", type=int, default=100, help="steps of the text encoder")
    options.add_argument("--export", type=Path, default=FOLDER)
    options.add_argument("--export-every", type=float, default=300.0, help="seconds")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    sounds, attributes = generate(args.pool, seed=args.seed)
    latents = encode(AutoencoderOobleck.from_pretrained(args.vae), sounds)
    del sounds
    tokenizer, scheduler = new_tokenizer(), new_scheduler()
    tokens, mask, row_of = caption_tokens(tokenizer)
    model = Denoiser().to(args.device)
    model.text_encoder.requires_grad_(False)
    average = copy.deepcopy(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, args.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    run = Run(args, {"model": model, "average": average}, optimizer)
    where = tokens.to(args.device), mask.to(args.device)
    if run.step == 0:
        labels = all_attributes().to(args.device)
        loss = learn_captions(model.text_encoder, *where, labels, steps=args.reading)
        average.text_encoder.load_state_dict(model.text_encoder.state_dict())
        print(f"captions read with a loss of {loss:.4f}", flush=True)
    with torch.no_grad():
        states = model.text_encoder(where[0], attention_mask=where[1])[0].cpu()
    exported, losses = time.monotonic(), []
    for step in run:
        rows = random_rows(latents, args.batch_size)
        texts = row_of[tuple(attributes[rows].T)]
        batch = (x.to(args.device) for x in (latents[rows], states[texts], mask[texts]))
        loss = velocity_loss(model, *batch, args.drop)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        update_average(average, model, step)
        losses.append(loss.item())
        if step % 20 == 0:
            run.record(loss=sum(losses) / len(losses))
            losses.clear()
        if time.monotonic() - exported > args.export_every:
            export_pipeline(average, args.vae, tokenizer, scheduler, args.export)
            exported = time.monotonic()
    export_pipeline(average, args.vae, tokenizer, scheduler, args.export)


if __name__ == "__main__":
    main()
