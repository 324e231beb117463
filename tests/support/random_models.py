"""Random transformers: blocks of many forms, stacked in ways that real models have.

A ``Plan`` says what a model is made of, so that hypothesis can shrink one that fails.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from support.toys import (
    WIDTH,
    AddingBlock,
    Attention,
    Block,
    DualBlock,
    InPlaceBlock,
    Mlp,
    ParallelBlock,
    SharedBlock,
    Toy,
)
from torch import Tensor, nn


class PostNormBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(dim), Mlp(dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = self.norm1(x + self.attn(x + c[:, None]))
        return self.norm2(x + self.mlp(x))


class SideBySideBlock(nn.Module):
    """Attention and feed-forward of the same input, as modules."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attn, self.mlp, self.norm = Attention(dim), Mlp(dim), nn.LayerNorm(dim)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        h = self.norm(x) + c[:, None]
        return x + self.attn(h) + self.mlp(h)


class TupleAttention(Attention):
    def forward(self, x: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return super().forward(x), None


class TupleMlp(Mlp):
    def forward(self, *, x: Tensor) -> tuple[None, Tensor]:  # type: ignore[override]
        return None, super().forward(x)


class TupleBlock(nn.Module):
    """Layers that return tuples, one of them with keywords only, and a tuple of the block."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attn, self.mlp, self.norm = TupleAttention(dim), TupleMlp(dim), nn.LayerNorm(dim)

    def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor]:
        x = x + self.attn(self.norm(x) + c[:, None])[0]
        return (x + self.mlp(x=self.norm(x))[1],)


class HyperBlock(nn.Module):
    """Two residual streams that are mixed around each layer."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attn, self.mlp, self.norm = Attention(dim), Mlp(dim), nn.LayerNorm(dim)
        self.read = nn.Parameter(torch.rand(2, 2))
        self.write = nn.Parameter(torch.rand(2, 2))
        self.mix = nn.Parameter(torch.eye(2) + 0.1 * torch.rand(2, 2))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        streams = torch.stack([x, 0.5 * x])
        for i, layer in enumerate((self.attn, self.mlp)):
            h = torch.einsum("s,sbtd->btd", self.read[i], streams)
            out = layer(self.norm(h) + c[:, None])
            streams = torch.einsum("rs,sbtd->rbtd", self.mix, streams)
            streams = streams + self.write[i][:, None, None, None] * out
        return streams.mean(0)


BLOCKS: dict[str, type[nn.Module]] = {
    "pre-norm": Block,
    "post-norm": PostNormBlock,
    "side-by-side": SideBySideBlock,
    "fused": ParallelBlock,
    "inside": AddingBlock,
    "dual": DualBlock,
    "shared-layer": SharedBlock,
    "tuple": TupleBlock,
    "hyper": HyperBlock,
    "in-place": InPlaceBlock,
}


@dataclass(frozen=True)
class Plan:
    """What a model is made of.

    Attributes:
        stacks: The blocks, in lists of one form each, in the order they run.
        nested: Whether those lists are in one list, or attributes of the model.
        skips: Whether the input of each stack is added to its output again.
        repeats: How often the first stack runs; more than once shares its modules.
        refiner: Whether a block works on the prompt before the others.
        keywords: Whether the model takes keywords only and returns a dict.
        seed: Of the weights.
    """

    stacks: tuple[tuple[str, int], ...]
    nested: bool = False
    skips: bool = False
    repeats: int = 1
    refiner: bool = False
    keywords: bool = False
    seed: int = 0


plans = st.builds(
    Plan,
    stacks=st.lists(
        st.tuples(st.sampled_from(sorted(BLOCKS)), st.integers(1, 3)), min_size=1, max_size=3
    ).map(tuple),
    nested=st.booleans(),
    skips=st.booleans(),
    repeats=st.sampled_from([1, 1, 2]),
    refiner=st.booleans(),
    keywords=st.booleans(),
    seed=st.integers(0, 999),
)


class RandomModel(Toy):
    """A denoiser after a plan."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(depth=0)
        del self.blocks
        self.plan = plan
        made = [
            nn.ModuleList(BLOCKS[form](WIDTH) for _ in range(depth)) for form, depth in plan.stacks
        ]
        if plan.nested:
            self.stages = nn.ModuleList(made)
        else:
            for i, stack in enumerate(made):
                self.add_module(f"blocks_{i}", stack)
        if plan.refiner:
            self.context_refiner = nn.ModuleList([Block(WIDTH)])

    def stacks(self) -> list[tuple[str, Any]]:
        forms = [form for form, _ in self.plan.stacks]
        if self.plan.nested:
            return list(zip(forms, self.stages, strict=True))
        return [(form, getattr(self, f"blocks_{i}")) for i, form in enumerate(forms)]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def run(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        c = self.condition(t, y)
        h, text = self.x_embedder(x), self.y_embedder(y)[:, None].expand(-1, 3, -1)
        if self.plan.refiner:
            text = self.context_refiner[0](text, c)
            c = c + text.mean(1)
        stacks = self.stacks()
        for form, stack in [stacks[0]] * (self.plan.repeats - 1) + stacks:
            before = h
            for block in stack:
                if form == "dual":
                    text, h = block(h, text, c)
                else:
                    out = block(h, c)
                    h = out[0] if isinstance(out, tuple) else out
            if self.plan.skips:
                h = h + 0.5 * before
        return self.head(nn.functional.layer_norm(h, h.shape[-1:]))


class PositionalModel(RandomModel):
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return self.run(x, t, y)


class KeywordModel(RandomModel):
    def forward(  # type: ignore[override]
        self, *, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor
    ) -> dict[str, Tensor]:
        return {"sample": self.run(hidden_states, timestep, class_labels)}

    def denoise(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self(hidden_states=x, timestep=t, class_labels=y)["sample"]


def model_of(plan: Plan) -> RandomModel:
    """The model with random weights, in evaluation mode and without gradients."""
    torch.manual_seed(plan.seed)
    model = (KeywordModel if plan.keywords else PositionalModel)(plan)
    return model.eval().requires_grad_(False)
