"""The video demo's own pipeline: a spatial-temporal diffusion transformer with text.

Built like Open-Sora v1.2: blocks that attend within a frame take turns with blocks that attend
along time, and each has self-attention, cross-attention to the text and a feed-forward, under one
timestep modulation that all share. These classes are diffusers' own kind, so this package needs
diffusers as soon as it is imported; nothing in it knows of caching.

Source: Zheng et al., "Open-Sora: Democratizing Efficient Video Production for All", arXiv
2412.20404. Here it is smaller in every way, with fixed instead of rotary positions along time.
"""

from .pipeline import ClipPipeline
from .transformer import STDiT
from .vae import FrameVAE

__all__ = ["ClipPipeline", "FrameVAE", "STDiT"]
