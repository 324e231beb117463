"""Layers are found in models that nobody registered, and nothing else is taken for one."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.toys import TOYS, Attention, Block, JointAttention, Mlp, Toy, build
from torch import Tensor, nn

import smoothcache as sc
from smoothcache.layers.modules import identify, layer_modules

DIM = 16
STEPS = 6


def found(model: Any) -> dict[str, str]:
    return {layer.path: layer.kind for layer in sc.find_layers(model)}


def leaves(model: nn.Module) -> dict[str, str]:
    """What is found below the first block."""
    layers = sc.find_layers(model)
    first = layers[0].block
    return {x.path.removeprefix(f"{first}."): x.kind for x in layers if x.block == first}


def is_reused(model: nn.Module, x: Tensor | None = None) -> bool:
    """Whether a generation under a schedule reuses all that was found, and nothing goes wrong."""
    model = model.eval().requires_grad_(False)
    x = torch.randn(2, 5, DIM) if x is None else x
    times = [1 - i / STEPS for i in range(STEPS)]
    plain = [model(x, torch.tensor([t, t])) for t in times]
    with sc.cached(model, sc.Schedule.uniform(model, STEPS, 1)):
        assert all(
            torch.equal(model(x, torch.tensor([t, t])), p)
            for t, p in zip(times, plain, strict=True)
        )
    schedule = sc.Schedule.uniform(model, STEPS, 2)
    with sc.cached(model, schedule) as run:
        outputs = [model(x, torch.tensor([t, t])) for t in times]
    assert all(out.isfinite().all() for out in outputs)
    return run.summary().never_ran == () and run.summary().reused >= schedule.reused


class Model(nn.Module):
    """Runs its blocks one after another on tokens, with the time added."""

    def __init__(self, **parts: Any) -> None:
        super().__init__()
        self.t_embedder = nn.Sequential(nn.Linear(1, DIM), nn.SiLU(), nn.Linear(DIM, DIM))
        for name, part in parts.items():
            setattr(self, name, part)
        self._order = list(parts)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        c = self.t_embedder(t[:, None])
        for name in self._order:
            x = run(getattr(self, name), x, c)
        return x


def run(part: nn.Module, x: Tensor, c: Tensor) -> Tensor:
    """Whatever a part is: a block, a plain module, or a list of either."""
    if isinstance(part, nn.ModuleList | nn.ModuleDict):
        for inner in part.values() if isinstance(part, nn.ModuleDict) else part:
            x = run(inner, x, c)
        return x
    if getattr(part, "takes_time", True) and not isinstance(part, nn.Sequential):
        return part(x, c)
    return part(x)


class PlainBlock(nn.Module):
    """A block without conditioning of its own."""

    def __init__(self, dim: int = DIM) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(dim), Mlp(dim)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = x + self.attn(x + c[:, None])
        return x + self.mlp(x)


@pytest.mark.parametrize("name", TOYS)
def test_toys(name: str) -> None:
    toy = build(name)
    layers = sc.find_layers(toy)
    assert len({layer.path for layer in layers}) == len(layers)
    assert {layer.block for layer in layers} == {f"blocks.{i}" for i in range(3)}
    assert all(layer.path.startswith(layer.block) and layer.macs is None for layer in layers)
    modules = layer_modules(toy, layers)
    assert all(modules[x.path] is toy.get_submodule(x.path) for x in layers)


def test_kinds_of_the_toys() -> None:
    single, dual, parallel = (found(build(name)) for name in ("single", "dual", "parallel-block"))
    assert set(single.values()) == {"self_attn", "ffn"}
    assert single["blocks.0.attn"] == "self_attn" and single["blocks.0.mlp"] == "ffn"
    assert dual["blocks.0.attn"] == "joint_attn"
    assert dual["blocks.0.ff"] == dual["blocks.0.ff_context"] == "ffn"
    assert parallel == {f"blocks.{i}": "block" for i in range(3)}


def test_identity_is_that_of_the_configuration() -> None:
    toy = build("single")
    same_shapes, narrower = build("single", seed=9), build("single", dim=32)
    assert identify(toy) == identify(same_shapes) == identify(copy.deepcopy(toy).half())
    assert identify(toy) != identify(narrower)
    assert identify(toy).class_name == "Toy"
    with sc.cached(toy, sc.Schedule.uniform(toy, 4, 2)):
        assert identify(toy) == identify(same_shapes)


class TimmAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(b, n, d)))


class OriginalBlock(nn.Module):
    """The layout of the DiT of its authors."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False)
        self.attn = TimmAttention(dim, 2)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        s1, b1, g1, s2, b2, g2 = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        x = x + g1 * self.attn(self.norm1(x) * (1 + s1) + b1)
        return x + g2 * self.mlp(self.norm2(x) * (1 + s2) + b2)


class FinalLayer(nn.Module):
    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False)
        self.linear = nn.Linear(dim, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class TimestepEmbedder(nn.Module):
    def __init__(self, dim: int, frequencies: int = 256) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(frequencies, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        angles = t[:, None].float() * torch.exp(-torch.arange(self.frequencies // 2) / 20)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))


class OriginalDiT(nn.Module):
    def __init__(self, dim: int = DIM, depth: int = 2) -> None:
        super().__init__()
        self.x_embedder = nn.Linear(4, dim)
        self.t_embedder = TimestepEmbedder(dim)
        self.y_embedder = nn.Embedding(11, dim)
        self.blocks = nn.ModuleList(OriginalBlock(dim) for _ in range(depth))
        self.final_layer = FinalLayer(dim, 8)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        c = self.t_embedder(t) + self.y_embedder(y)
        x = self.x_embedder(x)
        for block in self.blocks:
            x = block(x, c)
        return self.final_layer(x, c)

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float) -> Tensor:
        half = x[: len(x) // 2]
        out = self.forward(torch.cat([half, half]), t, y)[..., :4]
        cond, uncond = out.chunk(2)
        guided = uncond + cfg_scale * (cond - uncond)
        return torch.cat([guided, guided])


@pytest.mark.parametrize("dim", [16, 256])
def test_the_original_dit(dim: int) -> None:
    """At width 256 the embedder of the timestep leads back to the width that it came from."""
    torch.manual_seed(0)
    model = OriginalDiT(dim).eval().requires_grad_(False)
    assert found(model) == {
        "blocks.0.attn": "self_attn",
        "blocks.0.mlp": "ffn",
        "blocks.1.attn": "self_attn",
        "blocks.1.mlp": "ffn",
    }

    def generate() -> Tensor:
        x = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
        for i in range(STEPS):
            t = torch.full((2,), 1000 - 100 * i)
            x = x - model.forward_with_cfg(x, t, torch.tensor([1, 10]), 4.0) / STEPS
        return x

    plain = generate()
    with sc.cached(model, sc.Schedule.uniform(model, STEPS, 1)):
        assert torch.equal(generate(), plain)
    schedule = sc.Schedule.uniform(model, STEPS, 3)
    with sc.cached(model, schedule) as run:
        assert not torch.equal(generate(), plain)
    assert run.summary().reused == schedule.reused


class MultiheadBlock(nn.Module):
    def __init__(self, dim: int = DIM, text: int | None = None) -> None:
        super().__init__()
        self.text = text
        self.attn = nn.MultiheadAttention(dim, 2, batch_first=True, kdim=text, vdim=text)
        self.linear1, self.linear2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.mlp = nn.Sequential(self.linear1, nn.GELU(), self.linear2)
        del self.linear1, self.linear2

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        memory = x + c[:, None]
        if self.text:
            memory = memory[..., : self.text]
        x = x + self.attn(x, memory, memory, need_weights=False)[0]
        return x + self.mlp(x)


def test_multihead_attention_of_torch() -> None:
    model = Model(layers=nn.ModuleList(MultiheadBlock() for _ in range(2)))
    assert leaves(model) == {"attn": "self_attn", "mlp": "ffn"}
    assert is_reused(model)
    crossing = Model(layers=nn.ModuleList([MultiheadBlock(text=8)]))
    assert leaves(crossing)["attn"] == "cross_attn"
    assert is_reused(crossing)


class EncoderBlock(nn.TransformerEncoderLayer):
    def __init__(self) -> None:
        super().__init__(DIM, 2, 32, dropout=0.0, batch_first=True)
        self.takes_time = False


def test_encoder_layers_of_torch_are_reused_whole() -> None:
    """Their feed-forward is raw projections, and their fast path calls no part of them."""
    model = Model(layers=nn.ModuleList(EncoderBlock() for _ in range(2)))
    assert found(model) == {"layers.0": "block", "layers.1": "block"}
    assert is_reused(model)


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.inner(x, c)


@pytest.mark.parametrize(
    ("model", "prefixes"),
    [
        (
            Model(blocks=nn.ModuleList(Wrapper(PlainBlock()) for _ in range(2))),
            ["blocks.0.inner", "blocks.1.inner"],
        ),
        (
            Model(stages=nn.ModuleList(nn.ModuleList([PlainBlock()]) for _ in range(2))),
            ["stages.0.0", "stages.1.0"],
        ),
        (
            Model(blocks=nn.ModuleDict({"down": PlainBlock(), "up": PlainBlock()})),
            ["blocks.down", "blocks.up"],
        ),
        (Model(first=PlainBlock(), second=PlainBlock()), ["first", "second"]),
        (
            Model(trunk=nn.ModuleList([nn.ModuleDict({"deep": Wrapper(PlainBlock())})])),
            ["trunk.0.deep.inner"],
        ),
    ],
    ids=["wrapped", "nested lists", "dictionary", "no list", "all of it"],
)
def test_blocks_wherever_they_are(model: nn.Module, prefixes: list[str]) -> None:
    expected = {
        f"{prefix}.{leaf}": kind
        for prefix in prefixes
        for leaf, kind in (("attn", "self_attn"), ("mlp", "ffn"))
    }
    assert found(model) == expected
    assert is_reused(model)


class Residual(nn.Module):
    takes_time = False

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fn(x)


def test_pairs_of_attention_and_feed_forward_in_lists() -> None:
    """The layout of many small repositories: a list of lists of one layer each."""
    attention, feed_forward = Attention(DIM), Mlp(DIM)
    attention.takes_time = feed_forward.takes_time = False  # type: ignore[assignment]
    model = Model(layers=nn.ModuleList([nn.ModuleList([attention, feed_forward])]))
    assert found(model) == {"layers.0.0": "self_attn", "layers.0.1": "ffn"}
    assert is_reused(model)
    wrapped = Model(
        layers=nn.ModuleList(
            nn.ModuleList([Residual(Attention(DIM)), Residual(Mlp(DIM))]) for _ in range(2)
        )
    )
    assert found(wrapped) == {
        "layers.0.0.fn": "self_attn",
        "layers.0.1.fn": "ffn",
        "layers.1.0.fn": "self_attn",
        "layers.1.1.fn": "ffn",
    }
    assert is_reused(wrapped)


class ConditionedBlock(PlainBlock):
    """A block whose modulation comes from a network of its own."""

    name = "modulation"

    def __init__(self, dim: int = DIM) -> None:
        super().__init__(dim)
        net = nn.Sequential(nn.Linear(dim, 2 * dim), nn.SiLU(), nn.Linear(2 * dim, dim))
        setattr(self, self.name, net)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return super().forward(x, getattr(self, self.name)(c))


@pytest.mark.parametrize(
    "name",
    [
        "modulation",
        "mod",
        "img_mod",
        "adaLN_modulation",
        "adaln_single",
        "ada_mlp",
        "norm1",
        "norm1_context",
        "time_embed",
        "timestep_mlp",
        "time_mlp",
        "t_mlp",
        "cond_mlp",
        "emb_layers",
        "gate_mlp",
        "scale_shift_mlp",
        "pos_embed",
    ],
)
def test_conditioning_is_no_layer(name: str) -> None:
    """Frozen, it would freeze the time: its networks may look like feed-forwards all the same."""
    kind = type("Made", (ConditionedBlock,), {"name": name})
    model = Model(blocks=nn.ModuleList(kind() for _ in range(2)))
    assert leaves(model) == {"attn": "self_attn", "mlp": "ffn"}
    assert is_reused(model)


@pytest.mark.parametrize(
    "name", ["x_embedder", "context_embedder", "text_embedding", "t_embedder_2"]
)
def test_refiners_inside_an_embedder_are_no_layers(name: str) -> None:
    refiner = nn.Module()
    refiner.refiner_blocks = nn.ModuleList(PlainBlock() for _ in range(2))
    model = Model(blocks=nn.ModuleList(PlainBlock() for _ in range(2)))
    setattr(model, name, refiner)
    assert {path.split(".")[0] for path in found(model)} == {"blocks"}


@pytest.mark.parametrize(
    ("name", "part", "kind"),
    [
        ("self_attn", Attention, "self_attn"),
        ("attn1", Attention, "self_attn"),
        ("cross_attn", Attention, "cross_attn"),
        ("cross_attention", Attention, "cross_attn"),
        ("crossAttn", Attention, "cross_attn"),
        ("text_attn", Attention, "cross_attn"),
        ("attn2", Attention, "cross_attn"),
        ("attention", Attention, "self_attn"),
        ("time_attn", Attention, "self_attn"),
        ("attn", JointAttention, "joint_attn"),
        ("ff", Mlp, "ffn"),
        ("ffn", Mlp, "ffn"),
        ("feed_forward", Mlp, "ffn"),
        ("feedForward", Mlp, "ffn"),
        ("mlp_context", Mlp, "ffn"),
        ("w", Mlp, "ffn"),
    ],
)
def test_kinds_by_name_and_structure(name: str, part: type[nn.Module], kind: str) -> None:
    block = PlainBlock()
    del block.attn, block.mlp
    block.add_module("first", Attention(DIM))
    block.add_module(name, part(DIM))
    kinds = leaves(Model(blocks=nn.ModuleList([block])))
    assert kinds[name].removeprefix("temporal_").removeprefix("spatial_") == kind


class GatedMlp(nn.Module):
    """SwiGLU: the last projection in order of definition does not lead back."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(dim, 24), nn.Linear(24, dim), nn.Linear(dim, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


@pytest.mark.parametrize("name", ["mlp", "feed_forward", "swiglu"])
def test_gated_feed_forwards(name: str) -> None:
    block = PlainBlock()
    del block.mlp
    block.add_module(name, GatedMlp(DIM))
    assert leaves(Model(blocks=nn.ModuleList([block]))) == {"attn": "self_attn", name: "ffn"}


def test_spatial_and_temporal_stacks() -> None:
    model = Model(
        blocks=nn.ModuleList([PlainBlock()]), temporal_blocks=nn.ModuleList([PlainBlock()])
    )
    assert found(model) == {
        "blocks.0.attn": "spatial_self_attn",
        "blocks.0.mlp": "spatial_ffn",
        "temporal_blocks.0.attn": "temporal_self_attn",
        "temporal_blocks.0.mlp": "temporal_ffn",
    }


def test_a_temporal_attention_within_each_block() -> None:
    block = PlainBlock()
    block.add_module("temporal_attn", Attention(DIM))
    kinds = leaves(Model(blocks=nn.ModuleList([block])))
    assert kinds == {
        "attn": "spatial_self_attn",
        "mlp": "ffn",
        "temporal_attn": "temporal_self_attn",
    }


def test_a_wrapper_that_guides_in_its_own_forward() -> None:
    class Guided(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return 2 * self.model(x, t) - self.model(0.5 * x, t)

    model = Guided(Model(blocks=nn.ModuleList([PlainBlock()])))
    assert set(found(model)) == {"model.blocks.0.attn", "model.blocks.0.mlp"}
    assert is_reused(model)


def pipeline(**components: Any) -> Any:
    return SimpleNamespace(components={**components, "scheduler": None, "safety_checker": None})


class TextEncoder(nn.Module):
    """Has attention too, but no timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([PlainBlock()])

    def forward(self, input_ids: Tensor) -> Tensor:
        return input_ids


def test_the_denoiser_of_a_pipeline() -> None:
    toy = build("single")
    pipe = pipeline(vae=nn.Linear(2, 2), text_encoder=TextEncoder(), transformer=toy)
    assert sc.find_layers(pipe) == sc.find_layers(toy)
    assert identify(pipe) == identify(toy)


def test_two_denoisers_of_a_pipeline() -> None:
    pipe = pipeline(transformer=build("single", depth=1), transformer_2=build("dual", depth=1))
    assert list(found(pipe)) == [
        "transformer.blocks.0.attn",
        "transformer.blocks.0.mlp",
        "transformer_2.blocks.0.attn",
        "transformer_2.blocks.0.ff",
        "transformer_2.blocks.0.ff_context",
    ]
    assert identify(pipe).class_name == "Toy+DualStreamToy"


def test_a_compiled_model_is_the_model_inside() -> None:
    toy = build("single")
    wrapped = nn.Module()
    wrapped._orig_mod = toy
    assert sc.find_layers(wrapped) == sc.find_layers(toy)


@pytest.mark.parametrize("model", ["facebook/DiT-XL-2-256", None, 3, SimpleNamespace(), Toy])
def test_what_is_no_model(model: Any) -> None:
    with pytest.raises(sc.InvalidArgumentError, match=r"pipeline or a torch.nn.Module, got"):
        sc.find_layers(model)


def test_models_without_layers() -> None:
    with pytest.raises(sc.LayersNotFoundError, match=r"Sequential has no block with an attention"):
        sc.find_layers(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)))
    with pytest.raises(sc.LayersNotFoundError, match=r"takes a timestep.*vae, text_encoder"):
        sc.find_layers(pipeline(vae=nn.Linear(2, 2), text_encoder=TextEncoder()))


def test_a_block_alone_is_a_model() -> None:
    assert found(Block(DIM)) == {"attn": "self_attn", "mlp": "ffn"}
