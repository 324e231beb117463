"""Small diffusion transformers, each odd in one way that real ones are.

Every toy has ``denoise(x, t, y)``, one call in its own manner, and ``generate(...)``, a sampler
over falling timesteps that ends in a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

WIDTH, TOKENS, CLASSES = 16, 6, 4


class Attention(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v))


class Mlp(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn, self.mlp = Attention(dim), Mlp(dim)
        self.modulation = nn.Linear(dim, 4 * dim)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, gate1, shift2, gate2 = self.modulation(c)[:, None].chunk(4, dim=-1)
        x = x + gate1 * self.attn(self.norm1(x) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) + shift2)


class Toy(nn.Module):
    """Single stream: self-attention and feed-forward, conditioned on time and class."""

    block: type[nn.Module] = Block
    adds_inside = False  # whether layers return their input plus their branch

    def __init__(self, depth: int = 3, dim: int = WIDTH) -> None:
        super().__init__()
        self.x_embedder = nn.Linear(dim, dim)
        self.t_embedder = nn.Sequential(nn.Linear(1, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.y_embedder = nn.Embedding(CLASSES, dim)
        self.blocks = nn.ModuleList(self.block(dim) for _ in range(depth))
        self.head = nn.Linear(dim, dim)

    def condition(self, t: Tensor, y: Tensor) -> Tensor:
        return self.t_embedder(t[:, None].float() / 1000) + self.y_embedder(y)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        c = self.condition(t, y)
        h = self.x_embedder(x)
        for block in self.blocks:
            h = block(h, c)
        return self.head(h)

    def denoise(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self(x, t, y)

    def generate(
        self,
        num_steps: int = 8,
        *,
        seed: int = 0,
        batch: int = 1,
        tokens: int = TOKENS,
        stop_after: int | None = None,
        guidance_calls: int = 1,
        timesteps: Sequence[float] | None = None,
    ) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(batch, tokens, WIDTH, generator=generator)
        y = torch.full((batch,), seed % CLASSES)
        times = timesteps or [1000 * (1 - i / num_steps) for i in range(num_steps)]
        for i, time in enumerate(times):
            if stop_after is not None and i == stop_after:
                break
            t = torch.full((batch,), float(time))
            outputs = [self.denoise(x, t, (y + call) % CLASSES) for call in range(guidance_calls)]
            x = x - sum(outputs) / (num_steps * guidance_calls)
        return x


class DualBlock(nn.Module):
    """Two streams, joint attention that returns both of them, in the other order."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attn = JointAttention(dim)
        self.ff, self.ff_context = Mlp(dim), Mlp(dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, text: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        dx, dtext = self.attn(self.norm(x) + c[:, None], self.norm(text))
        x, text = x + dx, text + dtext
        return text + self.ff_context(text), x + self.ff(x)


class JointAttention(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(dim, dim) for _ in range(3))
        self.to_out, self.to_add_out = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        q = torch.cat([self.to_q(x), self.add_q_proj(text)], dim=1)
        k = torch.cat([self.to_k(x), self.add_k_proj(text)], dim=1)
        v = torch.cat([self.to_v(x), self.add_v_proj(text)], dim=1)
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.to_out(out[:, : x.shape[1]]), self.to_add_out(out[:, x.shape[1] :])


class DualStreamToy(Toy):
    """Text and image streams; layers and blocks return tuples."""

    block = DualBlock

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        c = self.condition(t, y)
        h, text = self.x_embedder(x), self.y_embedder(y)[:, None].expand(-1, 3, -1)
        for block in self.blocks:
            text, h = block(h, text, c)
        return self.head(h)


class SharedBlock(Block):
    """One feed-forward for two streams: it runs twice in a call, on different inputs."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x) + c[:, None])
        image, text = x[:, :-2], x[:, -2:]
        return torch.cat([image + self.mlp(self.norm2(image)), text + self.mlp(text)], dim=1)


class SharedLayerToy(Toy):
    """A layer called twice in one call."""

    block = SharedBlock


class KeywordBlock(Block):
    def forward(self, *, hidden_states: Tensor, temb: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(hidden_states, temb)


class KeywordOnlyToy(Toy):
    """Everything is passed by keyword."""

    block = KeywordBlock

    def forward(  # type: ignore[override]
        self, *, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor
    ) -> dict[str, Tensor]:
        c = self.condition(timestep, class_labels)
        h = self.x_embedder(hidden_states)
        for block in self.blocks:
            h = block(hidden_states=h, temb=c)
        return {"sample": self.head(h)}

    def denoise(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self(hidden_states=x, timestep=t, class_labels=y)["sample"]


class SelfForwardToy(Toy):
    """Its sampler calls ``self.forward``, and its blocks call ``forward`` of their layers."""

    class block(Block):
        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            x = x + self.attn.forward(self.norm1(x) + c[:, None])
            return x + self.mlp.forward(self.norm2(x))

    def denoise(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.forward(x, t, y)


class InstanceForwardMlp(Mlp):
    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.forward = self.run  # type: ignore[method-assign]

    def run(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class InstanceForwardBlock(Block):
    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.mlp = InstanceForwardMlp(dim)


class InstanceForwardToy(Toy):
    """Its constructor puts a forward on the instance, of the model and of its layers."""

    block = InstanceForwardBlock

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.forward = self.run  # type: ignore[method-assign]

    def run(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return 0.5 * super().forward(x, t, y)


class ParallelBlock(nn.Module):
    """Attention and feed-forward side by side, of raw projections: only the block can be reused."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, 7 * dim)
        self.linear2 = nn.Linear(5 * dim, dim)
        self.attn = NoProjectionAttention(dim)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        qkv, mlp = self.linear1(self.norm(x) + c[:, None]).split([3 * WIDTH, 4 * WIDTH], dim=-1)
        out = self.attn(*qkv.chunk(3, dim=-1))
        return x + self.linear2(torch.cat([out, nn.functional.gelu(mlp)], dim=-1))


class NoProjectionAttention(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.q_scale = nn.Linear(dim, dim, bias=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(self.q_scale(q), k, v)


class ParallelBlockToy(Toy):
    """Blocks whose residual is the layer."""

    block = ParallelBlock


class InPlaceBlock(Block):
    """Writes into the outputs of its layers, as fused kernels do."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x) + c[:, None]).mul_(0.5)
        return self.mlp(self.norm2(x)).add_(x)


class InPlaceToy(Toy):
    block = InPlaceBlock


class AddingAttention(Attention):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(nn.functional.layer_norm(x, x.shape[-1:]))


class AddingMlp(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(nn.functional.layer_norm(x, x.shape[-1:]))


class AddingBlock(nn.Module):
    """Layers that hold the residual stream: each returns its input plus its branch."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attn, self.mlp = AddingAttention(dim), AddingMlp(dim)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.mlp(self.attn(x + c[:, None]))


class ResidualInsideToy(Toy):
    block = AddingBlock
    adds_inside = True


TOYS: dict[str, type[Toy]] = {
    "single": Toy,
    "dual": DualStreamToy,
    "shared": SharedLayerToy,
    "keyword": KeywordOnlyToy,
    "self-forward": SelfForwardToy,
    "instance-forward": InstanceForwardToy,
    "parallel-block": ParallelBlockToy,
    "in-place": InPlaceToy,
}
# Their layers hold the residual stream, so what is reused is a difference, rounded.
ADDING_TOYS: dict[str, type[Toy]] = {"residual-inside": ResidualInsideToy}


def build(name: str, seed: int = 0, **kwargs: Any) -> Toy:
    """A toy with random weights, in evaluation mode and without gradients."""
    torch.manual_seed(seed)
    return {**TOYS, **ADDING_TOYS}[name](**kwargs).eval().requires_grad_(False)
