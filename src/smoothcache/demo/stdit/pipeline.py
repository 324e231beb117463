"""The pipeline: text in, clips out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ...errors import InvalidArgumentError
from .transformer import STDiT
from .vae import FrameVAE


@dataclass
class ClipPipelineOutput(BaseOutput):
    """The clips that the pipeline made.

    Attributes:
        frames: [batch, frames, channels, height, width] in [0, 1]; or a list of pictures for each
            clip, if the pipeline was asked for pictures.
    """

    frames: Any


class ClipPipeline(DiffusionPipeline):
    """Text to clip: rectified flow with guidance, over latents of single frames.

    Args:
        tokenizer: Makes bytes of text; a ``ByT5Tokenizer``.
        text_encoder: A ``T5EncoderModel``.
        transformer: Predicts the velocity.
        vae: Decodes frames one by one.
        scheduler: Of rectified flow.
        num_frames: Frames of a clip, unless the call asks for others.
        max_text_tokens: Bytes of a prompt and its end mark that the text encoder takes.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"

    def __init__(
        self,
        tokenizer: Any,
        text_encoder: Any,
        transformer: STDiT,
        vae: FrameVAE,
        scheduler: FlowMatchEulerDiscreteScheduler,
        num_frames: int = 8,
        max_text_tokens: int = 48,
    ) -> None:
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            transformer=transformer,
            vae=vae,
            scheduler=scheduler,
        )
        self.register_to_config(num_frames=num_frames, max_text_tokens=max_text_tokens)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        negative_prompt: str = "",
        num_frames: int | None = None,
        num_inference_steps: int = 30,
        guidance_scale: float = 2.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: Literal["pil", "pt", "latent"] = "pil",
        return_dict: bool = True,
    ) -> ClipPipelineOutput | tuple[Any]:
        """Makes a clip for each prompt.

        Args:
            prompt: What to show, one text or several.
            negative_prompt: What guidance leads away from.
            num_frames: Frames of a clip; None for those of the training.
            num_inference_steps: Steps of the solver, one call of the transformer each.
            guidance_scale: How far guidance leads away; 1 switches it off.
            generator: Of the first noise.
            output_type: "pil" for pictures, "pt" for a tensor in [0, 1], "latent" for latents
                [batch, channels, frames, height, width].
            return_dict: Whether to return an object instead of a tuple.

        Raises:
            InvalidArgumentError: If there is no prompt, or one that is longer than the text
                encoder takes.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise InvalidArgumentError("there is no prompt; give at least one text.")
        is_guided = guidance_scale > 1
        texts = [*[negative_prompt] * len(prompts), *prompts] if is_guided else prompts
        text, mask = self._encode(texts)
        latents = self._noise(len(prompts), num_frames or self.config.num_frames, generator)
        self.scheduler.set_timesteps(num_inference_steps, device=latents.device)
        for timestep in self.progress_bar(self.scheduler.timesteps):
            batch = torch.cat([latents, latents]) if is_guided else latents
            times = timestep.to(latents.dtype).expand(len(batch))
            velocity = self.transformer(batch, times, text, mask, return_dict=False)[0]
            if is_guided:
                without, towards = velocity.chunk(2)
                velocity = without + guidance_scale * (towards - without)
            latents = self.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        frames = latents if output_type == "latent" else self._decode(latents, output_type)
        self.maybe_free_model_hooks()
        return ClipPipelineOutput(frames=frames) if return_dict else (frames,)

    def _encode(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """The text encoder's output [texts, tokens, width] and the mask of its tokens."""
        tokens = self.tokenizer(texts, padding=True, return_tensors="pt")
        lengths, limit = tokens.attention_mask.sum(1), self.config.max_text_tokens
        if lengths.max() > limit:
            longest = texts[int(lengths.argmax())]
            raise InvalidArgumentError(
                f"the text {longest!r} is {len(longest.encode())} bytes long, and the text encoder "
                f"takes {limit - 1}; say it in fewer words."
            )
        device = self._execution_device
        mask = tokens.attention_mask.to(device)
        encoded = self.text_encoder(tokens.input_ids.to(device), mask).last_hidden_state
        return encoded.to(self.transformer.dtype), mask

    def _noise(self, clips: int, frames: int, generator: Any) -> Tensor:
        config = self.vae.config
        side = config.sample_size // self.vae.patch
        shape = (clips, config.latent_channels, frames, side, side)
        noise: Tensor = randn_tensor(
            shape, generator, device=self._execution_device, dtype=self.transformer.dtype
        )
        return noise

    def _decode(self, latents: Tensor, output_type: str) -> Any:
        """Pictures in [0, 1], [batch, frames, channels, height, width], or lists of them."""
        frames = latents.transpose(1, 2).flatten(0, 1) / self.vae.config.scaling_factor
        pixels = self.vae.decode(frames.to(self.vae.dtype)).sample
        clips = (pixels / 2 + 0.5).clamp(0, 1).unflatten(0, (len(latents), -1))
        if output_type == "pt":
            return clips
        whole = (255 * clips).round().byte().permute(0, 1, 3, 4, 2).cpu().numpy()
        from PIL import Image

        return [[Image.fromarray(frame) for frame in clip] for clip in whole]
