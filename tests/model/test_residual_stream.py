"""Layers that hold the residual stream: told from branches by one forward, and reused as such."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from support import toys
from support.reference import STEPS, ByHand, sample
from support.toys import ADDING_TOYS
from torch import Tensor, nn

import smoothcache as sc
from smoothcache.model.costs import MacCounter

WIDTH, TOKENS, DEPTH = 16, 8, 3


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


class Attention(nn.Module):
    """A plain branch; the layers below differ in what they do with it."""

    def __init__(self, dim: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def branch(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v))

    def forward(self, x: Tensor) -> Any:
        return self.branch(x)


class FeedForward(nn.Module):
    def __init__(self, dim: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def branch(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(self.norm(x))))

    def forward(self, x: Tensor) -> Any:
        return self.branch(x)


def layers_that(forward: Callable[..., Any]) -> tuple[type[nn.Module], type[nn.Module]]:
    """An attention and a feed-forward with the same forward."""
    attn = type("Attn", (Attention,), {"forward": forward})
    return attn, type("Ff", (FeedForward,), {"forward": forward})


class Net(nn.Module):
    """Blocks of two layers, each called as ``step`` says."""

    def __init__(
        self,
        layers: tuple[type[nn.Module], type[nn.Module]],
        step: Callable[[nn.Module, Tensor], Tensor] = lambda layer, x: layer(x),
        enter: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> None:
        super().__init__()
        self.time = nn.Linear(1, WIDTH)
        self.blocks = nn.ModuleList(Block(layers, step) for _ in range(DEPTH))
        self.enter = enter

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        x = self.enter(x + self.time(timestep[:, None])[:, None])
        for block in self.blocks:
            x = block(x)
        return x if x.ndim == 3 else x.flatten(3).sum(1) if x.shape[1] == 2 else x


class Block(nn.Module):
    def __init__(
        self,
        layers: tuple[type[nn.Module], type[nn.Module]],
        step: Callable[[nn.Module, Tensor], Tensor],
    ) -> None:
        super().__init__()
        self.attn, self.ff = (layer() for layer in layers)
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        return self.step(self.ff, self.step(self.attn, x))


def _adds(self: Any, x: Tensor) -> Tensor:
    return x + self.branch(x)


def _adds_into_its_input(self: Any, x: Tensor) -> Tensor:
    return x.add_(self.branch(x))


def _adds_gated(self: Any, x: Tensor) -> Tensor:
    return x + torch.sigmoid(self.branch(x).mean(1, keepdim=True)) * self.branch(x)


def _adds_with_dropout(self: Any, x: Tensor) -> Tensor:
    return x + nn.functional.dropout(self.branch(x), 0.1, self.training)


def _adds_given(self: Any, x: Tensor, *, residual: Tensor) -> Tensor:
    return self.branch(x) + residual


def _adds_in_a_tuple(self: Any, x: Tensor) -> tuple[Tensor, None]:
    return x + self.branch(x), None


def _adds_in_two_parts(self: Any, x: Tensor) -> Tensor:
    first, second = x.split(TOKENS // 2, dim=1)
    change = self.branch(x)
    first = first + change[:, : TOKENS // 2]
    return torch.cat([first, second + change[:, TOKENS // 2 :]], dim=1)


def _adds_to_a_product(self: Any, x: Tensor) -> Tensor:
    change = self.branch(x)
    eye = torch.eye(WIDTH)
    return torch.baddbmm(x, change, eye.expand(len(x), -1, -1))


def _adds_in_a_buffer(self: Any, x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    out[:] = x
    out += self.branch(x)
    return out


def _given_its_input(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x, residual=x)


def _from_a_tuple(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)[0]


RESIDUAL: dict[str, Callable[[], Net]] = {
    "adds": lambda: Net(layers_that(_adds)),
    "adds-into-its-input": lambda: Net(layers_that(_adds_into_its_input)),
    "adds-gated": lambda: Net(layers_that(_adds_gated)),
    "adds-with-dropout": lambda: Net(layers_that(_adds_with_dropout)),
    "adds-what-it-is-given": lambda: Net(layers_that(_adds_given), _given_its_input),
    "adds-in-a-tuple": lambda: Net(layers_that(_adds_in_a_tuple), _from_a_tuple),
    "adds-in-two-parts": lambda: Net(layers_that(_adds_in_two_parts)),
    "adds-to-a-product": lambda: Net(layers_that(_adds_to_a_product)),
    "adds-in-a-buffer": lambda: Net(layers_that(_adds_in_a_buffer)),
}


def _norms_after(self: Any, x: Tensor) -> Tensor:
    return nn.functional.layer_norm(x + self.branch(x), (WIDTH,))


def _mixes_streams(self: Any, x: Tensor) -> Tensor:
    mixed = torch.einsum("ij,bjtd->bitd", torch.full((2, 2), 0.5), x)
    return mixed + self.branch(x.mean(1))[:, None]


def _mixes_by_content(self: Any, x: Tensor) -> Tensor:
    change = self.branch(x.mean(1))
    weights = torch.softmax(torch.stack([change.mean((1, 2)), change.amax((1, 2))], 1), 1)
    weights = torch.stack([weights, weights.flip(1)], 1)
    return torch.einsum("bij,bjtd->bitd", weights, x) + change[:, None]


def _returns_a_function(self: Any, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    return self.branch(x), lambda change: x + change


def _calls_what_is_returned(layer: nn.Module, x: Tensor) -> Tensor:
    change, add = layer(x)
    return add(change)


def _as_two_streams(x: Tensor) -> Tensor:
    return torch.stack([x, x], 1)


MIXED: dict[str, Callable[[], Net]] = {
    "norms-after": lambda: Net(layers_that(_norms_after)),
    "mixes-streams": lambda: Net(layers_that(_mixes_streams), enter=_as_two_streams),
    "mixes-as-it-likes": lambda: Net(layers_that(_mixes_by_content), enter=_as_two_streams),
    "returns-a-function": lambda: Net(layers_that(_returns_a_function), _calls_what_is_returned),
}


def build(make: Callable[[], Net]) -> Net:
    torch.manual_seed(0)
    return make().eval()


def latents(step: int) -> Tensor:
    x = torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))
    return x * (1 + 0.3 * step)


def denoise(net: nn.Module, step: int) -> Tensor:
    return net(latents(step), torch.tensor([1.0 - 0.2 * step] * 2))


def generate(net: nn.Module, steps: int = 2) -> Tensor:
    return torch.stack([denoise(net, step) for step in range(steps)])


def test_a_plain_branch_is_reused_bit_for_bit() -> None:
    net = build(lambda: Net((Attention, FeedForward), lambda layer, x: x + layer(x)))
    last = sc.find_layers(net)[-1:]
    kept: list[Tensor] = []
    hook = net.blocks[-1].ff.register_forward_hook(lambda *x: kept.append(x[2]))
    streams: list[Tensor] = []
    before = net.blocks[-1].ff.register_forward_pre_hook(lambda _, x: streams.append(x[0]))
    generate(net)
    hook.remove(), before.remove()
    with sc.cached(net, sc.Schedule.uniform(net, 2, 2, layers=last)):
        reused = generate(net)[1]
    assert torch.equal(reused, streams[1] + kept[0])


@pytest.mark.parametrize("form", RESIDUAL)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_of_a_layer_that_adds_to_the_stream_the_difference_is_reused(form: str, mode: Any) -> None:
    net = build(RESIDUAL[form])
    last = sc.find_layers(net)[-1:]
    with mode():
        streams: list[Tensor] = []
        hook = net.blocks[-1].ff.register_forward_pre_hook(
            lambda _, x: streams.append(x[0].clone())
        )
        plain = generate(net)
        hook.remove()
        schedule = sc.Schedule.uniform(net, 2, 2, layers=last)
        with sc.cached(net, schedule) as run:
            with MacCounter() as first:
                computed = denoise(net, 0)
            with MacCounter() as second:
                reused = denoise(net, 1)
    assert torch.equal(computed, plain[0])
    torch.testing.assert_close(reused, streams[1] + (plain[0] - streams[0]))
    assert not torch.allclose(reused, plain[0])
    assert run.summary().reused == 1
    (observed,) = sc.observe_layers(net, lambda i: generate(net), select=_only(last[0].path))
    assert first.total - second.total == observed.macs


def _only(path: str) -> Callable[[str, nn.Module], bool]:
    return lambda candidate, module: candidate == path


@pytest.mark.parametrize("form", RESIDUAL)
def test_a_schedule_that_computes_everything_changes_nothing(form: str) -> None:
    net = build(RESIDUAL[form])
    plain = generate(net)
    with sc.cached(net, sc.Schedule.uniform(net, 2, 1)):
        assert torch.equal(generate(net), plain)


@pytest.mark.parametrize("form", ["adds", "adds-in-a-tuple", "adds-what-it-is-given"])
def test_the_difference_is_what_is_calibrated(form: str) -> None:
    """Curves are those of the same model with its residual connections outside of its layers."""
    inside = build(RESIDUAL[form])
    outside = build(lambda: Net((Attention, FeedForward), lambda layer, x: x + layer(x)))
    outside.load_state_dict(inside.state_dict())
    curves = [
        sc.calibrate(net, lambda i, net=net: generate(net, 4), 1, progress=False).errors
        for net in (inside, outside)
    ]
    np.testing.assert_allclose(*curves, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("predictor", ["hold", "taylor"])
def test_it_extrapolates_the_difference(predictor: str) -> None:
    inside = build(RESIDUAL["adds"])
    outside = build(lambda: Net((Attention, FeedForward), lambda layer, x: x + layer(x)))
    outside.load_state_dict(inside.state_dict())
    results = []
    for net in (inside, outside):
        with sc.cached(net, sc.Schedule.uniform(net, 5, 2, predictor=predictor)):
            results.append(generate(net, 5))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("toy_name", ADDING_TOYS)
@pytest.mark.parametrize("predictor", ["hold", "taylor"])
@pytest.mark.parametrize("calls", [1, 2])
def test_the_whole_run_is_what_reuse_by_hand_gives(
    toy_name: str, predictor: str, calls: int
) -> None:
    toy = toys.build(toy_name)
    schedule = sc.Schedule.uniform(toy, STEPS, 3, predictor=predictor)
    by_hand = ByHand(toy, schedule)
    expected = sample(by_hand.toy, calls=calls, begin=by_hand.begin)
    with sc.cached(toy, schedule) as run:
        torch.testing.assert_close(sample(toy, calls=calls), expected)
    assert run.summary().reused == schedule.reused * calls


def test_both_streams_of_a_joint_layer_are_added_to() -> None:
    class Joint(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
            self.to_out = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            both = torch.cat([y, x], 1)
            q, k, v = self.to_q(both), self.to_k(both), self.to_v(both)
            change = self.to_out(nn.functional.scaled_dot_product_attention(q, k, v))
            return y + change[:, : y.shape[1]], x + change[:, y.shape[1] :]

    class JointBlock(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn, self.ff = Joint(), FeedForward()

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            y, x = self.attn(x, y)
            return x + self.ff(x), y

    class JointNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(JointBlock() for _ in range(2))

        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            y = 2 * x.flip(1) + timestep[:, None, None]
            for block in self.blocks:
                x, y = block(x, y)
            return torch.cat([x, y], 1)

    torch.manual_seed(0)
    net = JointNet().eval()
    layer = next(x for x in sc.find_layers(net) if x.path == "blocks.1.attn")
    seen: list[tuple[Tensor, ...]] = []
    hook = net.blocks[1].attn.register_forward_hook(lambda _, x, out: seen.append((*x, *out)))
    generate(net)
    hook.remove()
    (x0, y0, new_y0, new_x0), (x1, y1, *_) = seen
    with sc.cached(net, sc.Schedule.uniform(net, 2, 2, layers=[layer])):
        reused = generate(net)[1]
    x = x1 + (new_x0 - x0)
    expected = torch.cat([x + net.blocks[1].ff(x), y1 + (new_y0 - y0)], 1)
    torch.testing.assert_close(reused, expected)


@pytest.mark.parametrize("form", MIXED)
def test_what_no_difference_keeps_is_refused_and_its_block_taken(form: str) -> None:
    net = build(MIXED[form])
    layers = sc.find_layers(net)
    with (
        pytest.raises(sc.ScheduleMismatchError, match=r"'blocks.2.ff'.*granularity=\"block\""),
        sc.cached(net, sc.Schedule.uniform(net, 2, 2, layers=layers[-1:])),
    ):
        generate(net)
    blocks = sc.observe_layers(net, lambda i: generate(net))
    assert [layer.path for layer in blocks] == [f"blocks.{i}" for i in range(DEPTH)]
    calibration = sc.calibrate(net, lambda i: generate(net), 1, max_gap=1, progress=False)
    assert [layer.kind for layer in calibration.layers] == ["block"] * DEPTH
    with pytest.raises(sc.InvalidArgumentError, match='granularity="block"'):
        sc.calibrate(net, lambda i: generate(net), 1, granularity="layer", progress=False)
    plain = generate(net)
    with sc.cached(net, sc.Schedule.uniform(net, 2, 2, layers=blocks[-1:])):
        reused = generate(net)
    assert torch.equal(reused[0], plain[0])
    assert not torch.allclose(reused[1], plain[0])


def test_in_a_compiled_model_the_difference_is_reused() -> None:
    net = build(RESIDUAL["adds"])
    schedule = sc.Schedule.uniform(net, 4, 2)
    with sc.cached(net, schedule):
        expected = generate(net, 4)
    for block in net.blocks:
        block.compile(backend="aot_eager")
    with sc.cached(net, schedule) as run:
        torch.testing.assert_close(generate(net, 4), expected)
    assert run.summary().reused == 4 * DEPTH


def test_real_hyper_connections_are_seen_through() -> None:
    package = pytest.importorskip("hyper_connections", reason="hyper-connections is not installed")
    init, expand, reduce = package.get_init_and_expand_reduce_stream_functions(4)

    class Connected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = init(dim=WIDTH, branch=Attention())
            self.ff = init(dim=WIDTH, branch=FeedForward())

        def forward(self, x: Tensor) -> Tensor:
            return self.ff(self.attn(x))

    net = build(lambda: Net((Attention, FeedForward)))
    net.blocks = nn.ModuleList(Connected() for _ in range(DEPTH))
    net.eval()
    net.enter = expand
    net.register_forward_hook(lambda module, x, output: reduce(output))
    layers = sc.observe_layers(net, lambda i: generate(net))
    assert {layer.kind for layer in layers} == {"block"}
    plain = generate(net)
    with sc.cached(net, sc.Schedule.uniform(net, 2, 2, layers=layers[-1:])):
        reused = generate(net)
    assert not torch.allclose(reused[1], plain[0])
    assert (reused[1] - plain[1]).norm() < 0.5 * (plain[0] - plain[1]).norm()


def test_the_blocks_of_k_diffusion_add_to_the_stream_themselves() -> None:
    model = pytest.importorskip(
        "k_diffusion.models.image_transformer_v1", reason="k-diffusion is not installed"
    )
    net = model.ImageTransformerDenoiserModelV1(3, 64, 128, 4, 4, (2, 2)).eval()
    x = torch.randn(1, 4, 8, 8)
    last = sc.find_layers(net)[-1:]
    old, new = net(x, torch.ones(1)), net(1.3 * x, torch.full((1,), 0.5))
    with sc.cached(net, sc.Schedule.uniform(net, 2, 2, layers=last)) as run:
        net(x, torch.ones(1))
        reused = net(1.3 * x, torch.full((1,), 0.5))
    assert run.summary().reused == 1
    assert (reused - new).norm() < (old - new).norm()
