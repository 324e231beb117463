"""Models that are not as one would wish: refused in a sentence, or run as they are."""

from __future__ import annotations

import copy
import functools
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from reference import STEPS, ByHand, levels, same, sample, times
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from toys import TOKENS, TOYS, WIDTH, Attention, Block, DualStreamToy, Mlp, Toy, build
from zoo import all_models

import smoothcache as sc
from smoothcache.layers import identify

NOTHING_KEPT = "no value had been computed for this call"
OTHER_SHAPES = "the shape of the inputs had changed"
NOT_FINITE = "what had been computed was not finite"

every_toy = pytest.mark.parametrize("toy_name", TOYS)
predictors = pytest.mark.parametrize("predictor", ["hold", "taylor"])


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def made(kind: type[Any], depth: int = 2) -> Any:
    torch.manual_seed(0)
    return kind(depth=depth).eval().requires_grad_(False)


def paths(layers: Sequence[sc.CacheLayer]) -> list[str]:
    return [layer.path for layer in layers]


def steps(pattern: str) -> tuple[bool, ...]:
    """A row from text: # is a computed step, a dot a reused one."""
    return tuple(mark == "#" for mark in pattern)


def uniform(model: Any, interval: int = 2, **options: Any) -> sc.Schedule:
    return sc.Schedule.uniform(model, STEPS, interval, noise_levels=levels(), **options)


def calibrated(model: Any, generate: Callable[[int], Any], **options: Any) -> sc.Calibration:
    settings: dict[str, Any] = {"num_samples": 1, "max_gap": 2, "progress": False, **options}
    return sc.calibrate(model, generate, **settings)


@contextmanager
def unaltered(model: Any) -> Iterator[None]:
    """Classes, attributes and hooks of all modules are afterwards what they were."""

    def traces() -> Any:
        return {
            path: (
                type(module),
                {
                    name: list(value.items()) if isinstance(value, dict) else value
                    for name, value in vars(module).items()
                },
            )
            for path, module in model.named_modules(remove_duplicate=False)
        }

    before = traces()
    yield
    assert traces() == before


@contextmanager
def refused(model: nn.Module, error: type[Exception], words: str) -> Iterator[None]:
    """Refused in these words, before or after anything ran, and the model is as it was."""
    with unaltered(model), pytest.raises(error, match=words):
        yield


# --------------------------------------------------------------------------- nothing to be found


class Bare(nn.Module):
    """Has the signature of a denoiser, and whatever parts."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.ran = 0

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.ran += 1
        return x * t[:, None, None]

    def denoise(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        out: Tensor = self(x, t, y)
        return out


WITHOUT_BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "nothing": Bare,
    "an empty list": lambda: Bare(blocks=nn.ModuleList()),
    "an empty dictionary": lambda: Bare(blocks=nn.ModuleDict()),
    "an empty sequence": lambda: Bare(blocks=nn.Sequential()),
    "empty lists in a list": lambda: Bare(blocks=nn.ModuleList(nn.ModuleList() for _ in range(3))),
    "empty dictionaries": lambda: Bare(blocks=nn.ModuleDict({"a": nn.ModuleDict()})),
    "a convolution": lambda: Bare(net=nn.Conv2d(3, 3, 3)),
    "a list of matrices": lambda: Bare(blocks=nn.ModuleList(nn.Linear(4, 4) for _ in range(3))),
    "an embedder alone": lambda: Bare(t_embedder=Mlp(8)),
    "a parameter": lambda: Bare(holder=nn.ParameterList([torch.zeros(3, 3)])),
}
without_blocks = pytest.mark.parametrize("kind", WITHOUT_BLOCKS)


@without_blocks
@pytest.mark.parametrize("granularity", ["auto", "layer", "block"])
def test_models_without_blocks_are_refused(kind: str, granularity: Any) -> None:
    model = WITHOUT_BLOCKS[kind]()
    words = r"Bare has no (block|attention).*(pass the denoiser itself|ask for the granularity)"
    ran: list[int] = []
    for attempt in (
        lambda: sc.find_layers(model, granularity=granularity),
        lambda: sc.Schedule.uniform(model, STEPS, 2, granularity=granularity),
        lambda: sc.observe_layers(model, ran.append, granularity=granularity),
        lambda: sc.calibrate(model, ran.append, granularity=granularity, progress=False),
    ):
        with refused(model, sc.LayersNotFoundError, words):
            attempt()
    assert ran == []


@without_blocks
def test_models_without_blocks_can_be_reused_whole(kind: str) -> None:
    model = WITHOUT_BLOCKS[kind]()
    schedule = uniform(model, granularity="model")
    with sc.cached(model, schedule) as run:
        sample(model)  # type: ignore[arg-type]
    assert run.summary().reused == model.ran == STEPS // 2
    calibration = calibrated(model, lambda i: sample(model), granularity="model")  # type: ignore[arg-type]
    assert calibration.errors.shape == (1, 1, 2, STEPS)


@every_toy
def test_empty_lists_beside_the_blocks_change_nothing(toy_name: str) -> None:
    toy = build(toy_name, depth=2)
    layers, blocks = (sc.find_layers(toy, granularity=x) for x in ("auto", "block"))  # type: ignore[arg-type]
    plain = sample(toy)
    for owner in (toy, *toy.blocks):
        owner.add_module("none_of_it", nn.ModuleList())
        owner.add_module("nothing", nn.ModuleDict())
        owner.add_module("empty", nn.Sequential())
        owner.add_module("missing", None)
    assert sc.find_layers(toy) == layers
    assert sc.find_layers(toy, granularity="block") == blocks
    with unaltered(toy), sc.cached(toy, uniform(toy)) as run:
        sample(toy)
    assert run.summary().never_ran == ()
    assert same(sample(toy), plain)


# ------------------------------------------------------------------- what returns nothing of use


class InPlaceAttention(Attention):
    def forward(self, x: Tensor) -> None:  # type: ignore[override]
        x.add_(super().forward(x))


class SaysAttention(Attention):
    answer: Any = "done"

    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        x.add_(super().forward(x))
        return self.answer


class SilentLayerBlock(Block):
    attention: type[Attention] = InPlaceAttention

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.attn = self.attention(dim)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = x + c[:, None]
        self.attn(x)
        return x + self.mlp(self.norm2(x))


class SilentLayerToy(Toy):
    """Its attention writes into its input and returns nothing."""

    block = SilentLayerBlock


class TalkingLayerBlock(SilentLayerBlock):
    attention = SaysAttention


class TalkingLayerToy(Toy):
    """Its attention writes into its input and returns something else."""

    block = TalkingLayerBlock


class SilentBlock(Block):
    def forward(self, x: Tensor, c: Tensor) -> None:  # type: ignore[override]
        x.add_(self.attn(self.norm1(x) + c[:, None]))
        x.add_(self.mlp(self.norm2(x)))


class SilentBlockToy(Toy):
    """Its blocks write into their input and return nothing."""

    block = SilentBlock

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        c, h = self.condition(t, y), self.x_embedder(x)
        for block in self.blocks:
            block(h, c)
        out: Tensor = self.head(h)
        return out


SILENT = [
    (SilentLayerToy, "auto", "blocks.0.attn", "NoneType"),
    (SilentLayerToy, "layer", "blocks.0.attn", "NoneType"),
    (TalkingLayerToy, "auto", "blocks.0.attn", "str"),
    (SilentBlockToy, "block", "blocks.0", "NoneType"),
]
silent = pytest.mark.parametrize(("kind", "granularity", "path", "returned"), SILENT)


@silent
def test_what_returns_no_tensor_cannot_be_calibrated(
    kind: type[Toy], granularity: Any, path: str, returned: str
) -> None:
    toy = made(kind)
    words = rf"'{path}' returned no tensor but {returned}.*leave it out with find_layers"
    with refused(toy, sc.CalibrationError, words):
        calibrated(toy, lambda i: sample(toy), granularity=granularity)


@silent
@predictors
def test_what_returns_no_tensor_cannot_be_reused(
    kind: type[Toy], granularity: Any, path: str, returned: str, predictor: str
) -> None:
    toy = made(kind)
    plain = sample(toy)
    schedule = uniform(toy, granularity=granularity, predictor=predictor)
    words = rf"'{path}' returned no tensor but {returned}.*leave it out of the schedule"
    with refused(toy, sc.ScheduleMismatchError, words), sc.cached(toy, schedule):
        sample(toy)
    handle = sc.enable(toy, schedule)
    with pytest.raises(sc.ScheduleMismatchError, match=words):
        sample(toy)
    assert handle.summary().held_bytes == 0
    handle.disable()
    assert same(sample(toy), plain)


@silent
def test_what_returns_no_tensor_may_be_computed_and_left_out(
    kind: type[Toy], granularity: Any, path: str, returned: str
) -> None:
    toy = made(kind)
    plain = sample(toy)
    with sc.cached(toy, uniform(toy, 1, granularity=granularity)):
        assert same(sample(toy), plain)
    kept = sc.find_layers(toy, select=lambda name, module: name.endswith("mlp"))
    schedule = uniform(toy, layers=kept)
    by_hand = ByHand(toy, schedule)
    with sc.cached(toy, schedule) as run:
        assert same(sample(toy), sample(by_hand.toy, begin=by_hand.begin))
    assert run.summary().reused == schedule.reused


@pytest.mark.parametrize("answer", [3, 1.5, True, [], {}, (None, None), object(), "text"])
def test_answers_without_tensors(answer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SaysAttention, "answer", answer)
    toy = made(TalkingLayerToy)
    words = rf"'blocks.0.attn' returned no tensor but {type(answer).__name__}"
    with refused(toy, sc.CalibrationError, words):
        calibrated(toy, lambda i: sample(toy))
    with refused(toy, sc.ScheduleMismatchError, words), sc.cached(toy, uniform(toy)):
        sample(toy)


class IgnoredBlock(Block):
    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x.add_(self.attn(self.norm1(x) + c[:, None]))
        return x.add_(self.mlp(self.norm2(x)))


class IgnoringToy(SilentBlockToy):
    """Its blocks write into their input and return it; the model looks at the input alone."""

    block = IgnoredBlock


MODES = pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])


@MODES
@pytest.mark.parametrize("kind", ["block", "whole"])
def test_blocks_whose_effect_on_their_input_is_what_counts(
    kind: str, mode: Callable[[], Any]
) -> None:
    """A reused one, as a residual or as it is, writes into its input too."""
    toy = made(IgnoringToy)
    toy.condition = lambda t, y: torch.zeros(len(t), WIDTH)
    blocks = sc.find_layers(toy, select=lambda path, m: kind if isinstance(m, Block) else False)
    assert len(blocks) == len(toy.blocks)
    with mode():
        x, y = torch.randn(1, TOKENS, WIDTH), torch.tensor([0])
        plain = toy.denoise(x, torch.tensor([1.0]), y)
        with sc.cached(toy, uniform(toy, layers=blocks)) as run:
            for time in times():
                torch.testing.assert_close(toy.denoise(x, torch.tensor([time]), y), plain)
    assert run.summary().reused == len(blocks) * STEPS // 2


class ViewBlock(Block):
    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return x.mul_(1.5)[:]


class ViewToy(SilentBlockToy):
    """Its blocks write into their input and return a view of it."""

    block = ViewBlock


@MODES
def test_writes_into_what_is_not_returned_are_refused_in_any_mode(mode: Callable[[], Any]) -> None:
    toy = made(ViewToy)
    with mode(), refused(toy, sc.ScheduleMismatchError, "writes into a tensor that it is given"):
        with sc.cached(toy, uniform(toy, granularity="block")):
            sample(toy)


# ---------------------------------------------------------------------------- the meta device


class AnyTimeToy(Toy):
    """Takes its timestep as a number."""

    def forward(self, x: Tensor, t: Any, y: Tensor) -> Tensor:
        return super().forward(x, torch.full((len(x),), float(t), device=x.device), y)


def on_meta(toy: Toy, times: Sequence[Any]) -> Tensor:
    x = torch.zeros(1, TOKENS, WIDTH, device="meta")
    y = torch.zeros(1, dtype=torch.long, device="meta")
    for time in times:
        x = x - toy(x, time, y)
    return x


@every_toy
def test_layers_are_found_on_the_meta_device(toy_name: str) -> None:
    toy, empty = build(toy_name, depth=2), build(toy_name, depth=2).to("meta")
    for granularity in ("auto", "layer", "block", "model"):
        found = sc.find_layers(empty, granularity=granularity)  # type: ignore[arg-type]
        assert found == sc.find_layers(toy, granularity=granularity)  # type: ignore[arg-type]
    assert identify(empty) == identify(toy)


def test_layers_are_observed_on_the_meta_device() -> None:
    toy, empty = made(AnyTimeToy), made(AnyTimeToy).to("meta")
    x, y = torch.zeros(1, TOKENS, WIDTH), torch.tensor([0])
    expected = sc.observe_layers(toy, lambda i: toy(x, 500.0, y))
    assert sc.observe_layers(empty, lambda i: on_meta(empty, times())) == expected


@pytest.mark.parametrize("granularity", ["auto", "block", "model"])
def test_calibrating_on_the_meta_device_is_refused(granularity: Any) -> None:
    toy = made(AnyTimeToy).to("meta")
    with refused(toy, sc.CalibrationError, r"on the meta device.*load its weights"):
        calibrated(toy, lambda i: on_meta(toy, times()), granularity=granularity)


def test_timesteps_on_the_meta_device_are_refused() -> None:
    toy = build("single", depth=2).to("meta")
    given = [torch.tensor([time], device="meta") for time in times()]
    words = r"timestep is on the meta device.*pass it as a number or on the CPU"
    with refused(toy, sc.SmoothCacheError, words):
        calibrated(toy, lambda i: on_meta(toy, given))
    with refused(toy, sc.ScheduleMismatchError, words), sc.cached(toy, uniform(toy)):
        on_meta(toy, given)


@pytest.mark.parametrize("granularity", ["auto", "block", "model"])
@pytest.mark.parametrize("predictor", sc.PREDICTORS)
def test_reuse_on_the_meta_device(granularity: Any, predictor: str) -> None:
    toy = made(AnyTimeToy).to("meta")
    schedule = uniform(toy, 3, granularity=granularity, predictor=predictor)
    with unaltered(toy), sc.cached(toy, schedule) as run:
        out = on_meta(toy, times())
    assert out.device.type == "meta" and out.shape == (1, TOKENS, WIDTH)
    assert run.summary().reused == schedule.reused
    assert run.summary().recomputed == {}


def test_checking_for_finite_values_on_the_meta_device() -> None:
    """There are none that could be otherwise."""
    toy = made(AnyTimeToy).to("meta")
    with sc.cached(toy, uniform(toy), check_finite=True) as run:
        on_meta(toy, times())
    assert run.summary().recomputed == {}


# ----------------------------------------------------------------------------- quantised models


class Packed(nn.Module):
    """A matrix of which only 4 bits a weight are kept, two in a byte."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = float(linear.weight.abs().max()) / 7
        levels = (linear.weight / self.scale).round().clamp(-8, 7).add(8).to(torch.uint8).flatten()
        self.weight = nn.Parameter(16 * levels[::2] + levels[1::2], requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        levels = torch.stack([self.weight // 16, self.weight % 16], dim=-1)
        weight = (levels.to(x.dtype) - 8).reshape(self.out_features, self.in_features) * self.scale
        return nn.functional.linear(x, weight, self.bias)


class Hidden(nn.Module):
    """A matrix whose weights are nowhere to be seen, as behind a kernel's own handle."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        object.__setattr__(self, "_handle", [linear])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self._handle[0](x)
        return out


class Adapted(nn.Module):
    """A matrix with a correction of low rank beside it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.base_layer = linear
        self.lora_A = nn.ModuleDict({"default": nn.Linear(linear.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, linear.out_features, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))
        return out


def replaced(model: nn.Module, kind: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            model.set_submodule(path, kind(module))
    return model.eval().requires_grad_(False)


def quantised(model: nn.Module) -> nn.Module:
    quantise = getattr(torch.ao.quantization, "quantize_dynamic", None)
    if quantise is None:
        pytest.skip("this PyTorch has no quantize_dynamic")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return quantise(model, {nn.Linear}, dtype=torch.qint8)  # type: ignore[no-any-return]


QUANTISED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "dynamic": quantised,
    "packed": functools.partial(replaced, kind=Packed),
    "hidden": functools.partial(replaced, kind=Hidden),
}
every_quantisation = pytest.mark.parametrize("how", QUANTISED)


@every_toy
@every_quantisation
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantised_models_have_the_same_layers(toy_name: str, how: str) -> None:
    toy, quantised = build(toy_name, depth=2), QUANTISED[how](build(toy_name, depth=2))
    for granularity in ("auto", "layer", "block"):
        found = sc.find_layers(quantised, granularity=granularity)  # type: ignore[arg-type]
        assert found == sc.find_layers(toy, granularity=granularity)  # type: ignore[arg-type]
    plain = sample(quantised)  # type: ignore[arg-type]
    schedule = uniform(quantised, 3)
    with unaltered(quantised):
        with sc.cached(quantised, uniform(quantised, 1)):
            assert same(sample(quantised), plain)  # type: ignore[arg-type]
        with sc.cached(quantised, schedule) as run:
            got = sample(quantised)  # type: ignore[arg-type]
    assert torch.equal(got[0], plain[0]) and not same(got, plain)
    assert run.summary().reused >= schedule.reused
    assert run.summary().recomputed == {}


QUANTISED_ARCHITECTURES = (
    "DiTTransformer2DModel",
    "FluxTransformer2DModel",
    "SD3Transformer2DModel",
    "LatteTransformer3DModel",
    "StableAudioDiTModel",
)


@pytest.mark.parametrize("name", QUANTISED_ARCHITECTURES)
@every_quantisation
@pytest.mark.filterwarnings("ignore")
def test_quantised_architectures_have_the_same_layers(name: str, how: str) -> None:
    model = all_models()[name].build()
    expected, identity = sc.find_layers(model), identify(model)
    quantised = QUANTISED[how](model)
    assert sc.find_layers(quantised) == expected
    assert identify(quantised) == identity


@pytest.mark.parametrize("toy_name", ["single", "dual", "in-place"])
def test_adapters_beside_the_matrices_change_no_kind(toy_name: str) -> None:
    """As PEFT puts them into a model, and so diffusers when it loads a LoRA."""
    adapted = replaced(build(toy_name, depth=1), Adapted)
    assert sc.find_layers(adapted) == sc.find_layers(build(toy_name, depth=1))


@pytest.mark.parametrize("toy_name", ["single", "dual", "in-place"])
def test_a_schedule_runs_with_adapters_that_came_later(toy_name: str) -> None:
    toy = build(toy_name, depth=2)
    schedule = replace(uniform(toy, 3), model=None)
    adapted: Any = replaced(build(toy_name, depth=2), Adapted)
    by_hand = ByHand(adapted, schedule)
    with unaltered(adapted), sc.cached(adapted, schedule) as run:
        assert same(sample(adapted), sample(by_hand.toy, begin=by_hand.begin))
    assert run.summary().reused == schedule.reused


# ------------------------------------------------------------------------------- training mode


class DroppingOutMlp(Mlp):
    def __init__(self, dim: int, p: float = 0.1) -> None:
        super().__init__(dim)
        self.drop = nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.drop(super().forward(x))
        return out


def with_dropout(p: float) -> Toy:
    toy: Toy = made(Toy)
    toy.blocks[1].mlp = DroppingOutMlp(WIDTH, p)
    return toy


def warnings_of(model: Any) -> list[warnings.WarningMessage]:
    """What is said when a model is put under a schedule, and when it is calibrated."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with sc.cached(model, uniform(model)) as run:
            run.reset()
        sc.enable(model, uniform(model)).disable()
        with pytest.raises(sc.CalibrationError, match="never ran"):
            calibrated(model, lambda i: None)
    return [one for one in caught if issubclass(one.category, sc.SmoothCacheWarning)]


@pytest.mark.parametrize("p", [0.1, 1.0])
def test_dropout_in_training_mode_is_said(p: float) -> None:
    said = warnings_of(with_dropout(p).train())
    assert len(said) == 3
    for one in said:
        for words in ("Toy is in training mode", "'blocks.1.mlp.drop'", "eval()"):
            assert words in str(one.message)


@pytest.mark.parametrize(
    "kind", [nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout]
)
def test_every_kind_of_dropout_is_said(kind: type[nn.Module]) -> None:
    toy = with_dropout(0.0).train()
    toy.blocks[1].mlp.drop = kind(0.5)
    assert len(warnings_of(toy)) == 3


def test_one_dropout_left_in_training_mode_is_said() -> None:
    toy = with_dropout(0.1).eval()
    toy.blocks[1].mlp.drop.train()
    assert len(warnings_of(toy)) == 3


@pytest.mark.parametrize(
    "toy",
    [
        with_dropout(0.1).eval(),
        with_dropout(0.0).train(),
        with_dropout(0.0).eval(),
        build("single").train(),
    ],
    ids=["evaluation", "dropout of nothing", "neither", "no dropout"],
)
def test_nothing_is_said_where_nothing_is_dropped(toy: Toy) -> None:
    assert warnings_of(toy) == []


def test_of_the_denoisers_of_a_pipeline_any_is_said() -> None:
    text_encoder = DroppingOutMlp(WIDTH).train()
    pipe = SimpleNamespace(
        components={
            "transformer": with_dropout(0.1).eval(),
            "transformer_2": with_dropout(0.1).train(),
            "text_encoder": text_encoder,
        }
    )
    with pytest.warns(sc.SmoothCacheWarning, match=r"'blocks\.1\.mlp\.drop'"):
        sc.enable(pipe, uniform(pipe)).disable()
    pipe.components["transformer_2"].eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error", sc.SmoothCacheWarning)
        sc.enable(pipe, uniform(pipe)).disable()


class MultiheadBlock(Block):
    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.attn = nn.MultiheadAttention(dim, 2, dropout=0.3, batch_first=True)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        h = self.norm1(x) + c[:, None]
        x = x + self.attn(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class MultiheadToy(Toy):
    block = MultiheadBlock


@pytest.mark.parametrize("what", ["attention of torch", "feature alpha dropout"])
def test_other_dropout_is_said_too(what: str) -> None:
    toy = made(MultiheadToy) if what == "attention of torch" else with_dropout(0.0)
    if what == "feature alpha dropout":
        toy.blocks[1].mlp.drop = nn.FeatureAlphaDropout(0.5)
    toy.train()
    x, t, y = torch.ones(1, TOKENS, WIDTH), torch.tensor([1.0]), torch.tensor([0])
    assert not torch.equal(toy(x, t, y), toy(x, t, y))
    assert len(warnings_of(toy)) == 3


def test_the_warning_names_the_line_of_the_caller() -> None:
    assert {one.filename for one in warnings_of(with_dropout(0.1).train())} == {__file__}


# ------------------------------------------------------------------------------------- wrappers


class Distributed(nn.parallel.DistributedDataParallel):
    """As seen from outside; it needs no process group."""

    def __init__(self, module: nn.Module) -> None:
        nn.Module.__init__(self)
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


class WithAdapters(nn.Module):
    """What PEFT makes of a model, as seen from outside."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.base_model = nn.Module()
        self.base_model.model = module
        self.peft_config = {"default": SimpleNamespace(r=8)}

    def get_base_model(self) -> nn.Module:
        inner: nn.Module = self.base_model.model
        return inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model.model(*args, **kwargs)


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")  # type: ignore[return-value]


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "data parallel": nn.DataParallel,
    "compiled": compiled,
    "distributed": Distributed,
    "adapters": WithAdapters,
    "distributed, of adapters": lambda module: Distributed(WithAdapters(module)),
    "adapters, of compiled": lambda module: WithAdapters(compiled(module)),
    "data parallel, of distributed": lambda module: nn.DataParallel(Distributed(module)),
}


@pytest.mark.parametrize("how", WRAPPERS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_wrappers_are_looked_through(how: str) -> None:
    toy = build("single", depth=1)
    schedule = uniform(toy, 3)
    with sc.cached(toy, schedule):
        expected = sample(toy)
    torch.compiler.reset()
    wrapped = WRAPPERS[how](toy)
    keys = list(wrapped.state_dict())
    assert sc.find_layers(wrapped) == sc.find_layers(toy)
    assert identify(wrapped) == identify(toy)
    assert uniform(wrapped, 3) == schedule
    if "compiled" in how:
        return  # it takes long, and is run in test_apply.py
    caller: Any = SimpleNamespace(denoise=lambda x, t, y: wrapped(x, t, y))
    with unaltered(toy), sc.cached(wrapped, schedule) as run:
        assert list(wrapped.state_dict()) == keys
        torch.testing.assert_close(sample(caller), expected)
    assert run.summary().reused == schedule.reused
    assert run.summary().recomputed == {}


def test_a_base_model_that_is_no_module_is_not_looked_into() -> None:
    toy = build("single", depth=1)
    toy.peft_config = {}
    assert paths(sc.find_layers(toy)) == ["blocks.0.attn", "blocks.0.mlp"]
    toy.get_base_model = lambda: None
    assert paths(sc.find_layers(toy)) == ["blocks.0.attn", "blocks.0.mlp"]


class ManyDevices(nn.DataParallel):
    """As on a machine with two accelerators."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.device_ids = [0, 1]


@pytest.mark.parametrize("where", ["alone", "in a pipeline", "in a wrapper"])
def test_several_devices_in_one_process_are_refused(where: str) -> None:
    wrapped = ManyDevices(build("single", depth=1))
    model: Any = wrapped
    if where == "in a pipeline":
        model = SimpleNamespace(components={"transformer": wrapped})
    elif where == "in a wrapper":
        model = WithAdapters(wrapped)
    schedule = uniform(wrapped.module)
    ran: list[int] = []
    for attempt in (
        lambda: sc.find_layers(model),
        lambda: identify(model),
        lambda: sc.Schedule.uniform(model, STEPS, 2),
        lambda: sc.enable(model, schedule),
        lambda: sc.observe_layers(model, ran.append),
        lambda: calibrated(model, ran.append),
    ):
        words = r"DataParallel copies.*one process for each device \(torchrun\)"
        with refused(wrapped, sc.InvalidArgumentError, words):
            attempt()
    assert ran == []
    wrapped.device_ids = [0]
    assert sc.find_layers(model) == sc.find_layers(wrapped.module)


class AnyArguments(nn.Module):
    """Hands on whatever it is given, as home-made wrappers do."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def in_order(names: Sequence[str]) -> tuple[sc.Run, sc.Schedule]:
    wrapped = AnyArguments(build("keyword", depth=2))
    schedule = uniform(wrapped)
    x = torch.ones(1, TOKENS, WIDTH)
    with sc.cached(wrapped, schedule) as run:
        for time in times():
            given = {
                "hidden_states": x,
                "timestep": torch.tensor([time]),
                "class_labels": torch.tensor([1]),
            }
            wrapped(**{name: given[name] for name in names})
    return run, schedule


def test_a_wrapper_that_names_no_argument() -> None:
    run, schedule = in_order(["hidden_states", "timestep", "class_labels"])
    assert run.summary().reused == schedule.reused
    assert run.schedule.layers[0].path == "module.blocks.0.attn"


def test_a_wrapper_that_names_no_argument_in_any_order() -> None:
    run, schedule = in_order(["class_labels", "hidden_states", "timestep"])
    assert run.summary().reused == schedule.reused


# ------------------------------------------------------------------------ models without a time


class Timeless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.toy = build("single", depth=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.toy(x, torch.zeros(len(x)), torch.zeros(len(x), dtype=torch.long))
        return out


def test_a_model_without_a_timestep() -> None:
    model = Timeless()
    x = torch.zeros(1, TOKENS, WIDTH)
    assert paths(sc.find_layers(model)) == ["toy.blocks.0.attn", "toy.blocks.0.mlp"]
    words = r"Timeless was called without a timestep, so the step cannot be told"
    with refused(model, sc.ScheduleMismatchError, words), sc.cached(model, uniform(model)):
        model(x)
    handle = sc.enable(model, uniform(model))
    for _ in range(2):
        with pytest.raises(sc.ScheduleMismatchError, match=words):
            model(x)
    handle.disable()
    assert model(x).shape == x.shape
    with refused(model, sc.SmoothCacheError, words):
        calibrated(model, lambda i: model(x))
    with refused(model, sc.SmoothCacheError, words):
        sc.observe_layers(model, lambda i: model(x))


def test_a_model_without_a_timestep_cannot_be_calibrated() -> None:
    model = Timeless()
    with refused(model, sc.CalibrationError, r"without a timestep"):
        calibrated(model, lambda i: model(torch.zeros(1, TOKENS, WIDTH)))


def test_a_pipeline_without_a_denoiser() -> None:
    model = Timeless()
    pipe = SimpleNamespace(components={"transformer": model, "vae": nn.Linear(2, 2)})
    words = r"no component .* takes a timestep; pass the denoiser itself.*transformer, vae"
    for attempt in (
        lambda: sc.find_layers(pipe),
        lambda: sc.enable(pipe, uniform(model)),
        lambda: calibrated(pipe, lambda i: None),
    ):
        with refused(model, sc.LayersNotFoundError, words):
            attempt()


@pytest.mark.parametrize(
    "sigmas",
    [
        pytest.param([80.0, 57.6, 40.8, 28.4, 19.4, 12.9, 8.4, 5.3], id="to 80"),
        pytest.param([1000.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.5, 0.1], id="in one leap"),
        pytest.param([14.6, 9.7, 6.2, 3.9, 2.3, 1.3, 0.7, 0.3], id="to 14.6"),
        pytest.param([1.09, 0.95, 0.7, 0.4, 0.1, -0.3, -0.8, -1.5], id="logarithms"),
    ],
)
def test_times_of_other_scales(sigmas: list[float]) -> None:
    """A model that is given the noise level itself, or its logarithm."""
    toy = build("single", depth=2)
    schedule = uniform(toy)
    by_hand = ByHand(toy, schedule)
    expected = sample(by_hand.toy, begin=by_hand.begin, timesteps=sigmas)
    with sc.cached(toy, schedule) as run:
        assert same(sample(toy, timesteps=sigmas), expected)
    assert run.summary().finished == 1


# ------------------------------------------------------------------- values that are no numbers


class SpoiledAttention(Attention):
    """Its output is spoiled while ``add`` is no number."""

    add = 0.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.add


class SpoiledBlock(Block):
    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.attn = SpoiledAttention(dim)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x) + c[:, None]).nan_to_num(0.5, 0.5, 0.5)
        return x + self.mlp(self.norm2(x))


class SpoiledToy(Toy):
    """Survives what is not finite in the output of an attention."""

    block = SpoiledBlock

    def spoil(self, step: int, at: Sequence[int], value: float) -> None:
        self.blocks[0].attn.add = value if step in at else 0.0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@predictors
@pytest.mark.parametrize("at", [(0,), (3,), (4,), (0, 1), (0, 3, 6), tuple(range(STEPS))])
def test_what_is_not_finite_is_not_reused(
    value: float, predictor: str, at: tuple[int, ...]
) -> None:
    """By hand: where nothing finite was computed, the next step computes."""
    toy = made(SpoiledToy)
    spoiled = "blocks.0.attn"
    schedule = uniform(toy, 3, predictor=predictor)
    planned = schedule.rows[spoiled].computed
    expected_row, missing = [], False
    for step in range(STEPS):
        computes = planned[step] or missing
        missing = (step in at) if computes else missing
        expected_row.append(computes)
    rows = {**schedule.rows, spoiled: sc.Row(tuple(expected_row), predictor)}
    by_hand = ByHand(toy, sc.Schedule(STEPS, rows, schedule.layers, noise_levels=levels()))

    def spoil_by_hand(step: int, branch: int) -> None:
        by_hand.begin(step, branch)
        history = by_hand.outputs.get((spoiled, branch, 0), [])
        history[:] = [kept for kept in history if kept[1][0].isfinite().all()]
        by_hand.toy.spoil(step, at, value)

    expected = sample(by_hand.toy, begin=spoil_by_hand)
    with sc.cached(toy, schedule, check_finite=True) as run:
        got = sample(toy, begin=lambda step, branch: toy.spoil(step, at, value))
    torch.testing.assert_close(got, expected)
    if predictor == "hold":
        assert same(got, expected)
    recomputed = sum(expected_row) - sum(planned)
    assert run.summary().recomputed == ({NOT_FINITE: recomputed} if recomputed else {})
    assert run.summary().held_bytes == 0


@pytest.mark.parametrize("granularity", ["block", "model"])
def test_what_is_not_finite_is_not_reused_of_blocks_and_models(granularity: Any) -> None:
    class Spoiled(SpoiledToy):
        def __init__(self, depth: int = 2) -> None:
            super().__init__(depth)
            self.value = 0.0

        def spoil(self, step: int, at: Sequence[int], value: float) -> None:
            self.value = value if step in at else 0.0

        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            c, h = self.condition(t, y), self.x_embedder(x)
            h = self.blocks[0](h + self.value, c).nan_to_num(0.5)
            return self.head(self.blocks[1](h, c))

    toy = made(Spoiled)
    for value, at in ((0.0, ()), (float("nan"), (0, 3))):
        with sc.cached(toy, uniform(toy, 3, granularity=granularity), check_finite=True) as run:
            out = sample(toy, begin=lambda step, _, v=value, a=at: toy.spoil(step, a, v))
        layers = 2 if granularity == "block" else 1
        assert out[-1].isfinite().all()
        spoiled = 2 if granularity == "block" and at else 0
        assert run.summary().recomputed == ({NOT_FINITE: spoiled} if spoiled else {})
        assert run.summary().reused == 5 * layers - spoiled


class Operators(TorchDispatchMode):
    """Names of all operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@every_toy
@pytest.mark.parametrize("granularity", ["auto", "block", "model"])
def test_nothing_is_checked_unless_asked_for(toy_name: str, granularity: Any) -> None:
    toy = build(toy_name, depth=2)
    names = {}
    for check in (False, True):
        with sc.cached(toy, uniform(toy, granularity=granularity), check_finite=check) as run:
            with Operators() as operators:
                sample(toy)
        names[check] = operators.names
        assert run.summary().recomputed == {}
    checks = {"isfinite", "isnan", "isinf", "abs", "eq", "ne", "all", "_local_scalar_dense"}
    assert not names[False] & checks
    assert {"_local_scalar_dense"} < names[True] & checks


def test_checking_changes_nothing_where_all_is_finite() -> None:
    toy = build("dual", depth=2)
    results = []
    for check in (False, True):
        with sc.cached(toy, uniform(toy, 3, predictor="taylor"), check_finite=check):
            results.append(sample(toy, calls=2))
    assert same(*results)


def test_what_was_not_finite_is_no_reason_in_the_next_generation() -> None:
    toy = made(SpoiledToy)
    scheduler = SimpleNamespace(timesteps=torch.arange(1000).flip(0))
    pipe = SimpleNamespace(components={"transformer": toy}, scheduler=scheduler)

    def generate(start: int, value: float) -> None:
        scheduler.timesteps = torch.tensor(times())
        x = torch.ones(1, TOKENS, WIDTH)
        for step, time in list(enumerate(times()))[start:]:
            toy.spoil(step, (4, 5, 6, 7), value)
            x = x - toy(x, torch.tensor([time]), torch.tensor([0])) / STEPS

    schedule = uniform(pipe, 4)
    with sc.cached(pipe, schedule, check_finite=True) as run:
        generate(0, float("nan"))
        assert run.summary().recomputed == {NOT_FINITE: 3}
        generate(5, 0.0)
    recomputed = dict(run.summary().recomputed)
    assert recomputed.pop(NOT_FINITE) == 3
    assert sum(recomputed.values()) == len(schedule.rows)


# -------------------------------------------------------------- shapes that change in the middle


class CarefulByHand(ByHand):
    """Drops what is stale, and what was computed for inputs of another form."""

    def __init__(self, toy: Toy, schedule: sc.Schedule) -> None:
        self._forms: dict[tuple[str, int, int], Any] = {}
        super().__init__(toy, schedule)

    def _replacement(self, path: str, kind: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        inner = super()._replacement(path, kind, forward)
        computed = self._schedule.rows[path].computed

        def careful(*args: Any, **kwargs: Any) -> Any:
            place = (path, self._branch, self._uses.get(path, -1) + 1)
            form = [(x.shape, x.dtype) for x in pytree.tree_leaves((args, kwargs))]
            due = max(step for step in range(self._step + 1) if computed[step])
            history = self.outputs.get(place, [])
            is_stale = not computed[self._step] and history and history[-1][0] < due
            if self._forms.get(place, form) != form or is_stale:
                self.outputs.pop(place, None)
            self._forms[place] = form
            return inner(*args, **kwargs)

        return careful


def assert_as_by_hand(toy: Toy, schedule: sc.Schedule, reason: str, **options: Any) -> sc.Summary:
    """Under a schedule as by hand, recomputed as often, and the model is left as it was.

    How many values an extrapolation goes through after a recomputation is left open.
    """
    by_hand = CarefulByHand(toy, schedule)
    expected = sample(by_hand.toy, begin=by_hand.begin, **options)
    with unaltered(toy), sc.cached(toy, schedule) as run:
        got = [sample(toy, **options) for _ in range(2)]
    assert same(*got)
    if all(row.predictor == "hold" for row in schedule.rows.values()):
        assert same(got[0], expected)
    assert [x.shape for x in got[0]] == [x.shape for x in expected]
    summary = run.summary()
    recomputed = {reason: 2 * by_hand.recomputed} if by_hand.recomputed else {}
    assert summary.recomputed == recomputed
    assert summary.finished == 2
    return summary


class DroppingToy(Toy):
    """Lets its blocks see only some of the tokens at some times; outside, nothing changes."""

    kept: Callable[[float], int] = staticmethod(lambda time: TOKENS)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        c, h = self.condition(t, y), self.x_embedder(x)
        kept = self.kept(float(t[0]))
        for block in self.blocks:
            h = torch.cat([block(h[:, :kept], c), h[:, kept:]], dim=1)
        out: Tensor = self.head(h)
        return out


class MergingToy(Toy):
    """Merges neighbouring tokens at some times, and parts them again."""

    kept: Callable[[float], int] = staticmethod(lambda time: TOKENS)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        c, h = self.condition(t, y), self.x_embedder(x)
        group = TOKENS // self.kept(float(t[0]))
        for block in self.blocks:
            merged = h.unflatten(1, (-1, group)).mean(dim=2)
            h = h + (block(merged, c) - merged).repeat_interleave(group, dim=1)
        out: Tensor = self.head(h)
        return out


class HalvingToy(Toy):
    """Runs its blocks on the first sample of a batch alone at some times."""

    kept: Callable[[float], int] = staticmethod(lambda time: TOKENS)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        c, h = self.condition(t, y), self.x_embedder(x)
        n = len(x) if self.kept(float(t[0])) == TOKENS else 1
        for block in self.blocks:
            h = torch.cat([block(h[:n], c[:n]), h[n:]])
        out: Tensor = self.head(h)
        return out


PATTERNS = {
    "from step 1": lambda time: TOKENS if time > 900 else 3,
    "from step 4": lambda time: TOKENS if time > 500 else 3,
    "at step 5 alone": lambda time: 3 if time == 375 else TOKENS,
    "at every other step": lambda time: 3 if (time / 125) % 2 else TOKENS,
    "three lengths": lambda time: {0: TOKENS, 1: 3, 2: 2}[int(time / 125) % 3],
}


@pytest.mark.parametrize("kind", [DroppingToy, MergingToy, HalvingToy])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("granularity", ["auto", "block"])
@pytest.mark.parametrize(("predictor", "interval"), [("hold", 3), ("hold", 4), ("taylor", 2)])
def test_tokens_dropped_inside_the_model(
    kind: type[Toy],
    pattern: str,
    granularity: Any,
    predictor: str,
    interval: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kind, "kept", staticmethod(PATTERNS[pattern]))
    toy = made(kind)
    schedule = uniform(toy, interval, granularity=granularity, predictor=predictor)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sc.SmoothCacheWarning)
        assert_as_by_hand(toy, schedule, OTHER_SHAPES, batch=2)


def test_tokens_dropped_are_recomputed_and_counted() -> None:
    class Dropping(DroppingToy):
        kept = staticmethod(PATTERNS["at step 5 alone"])

    toy = made(Dropping)
    schedule = uniform(toy, 4)
    summary = assert_as_by_hand(toy, schedule, OTHER_SHAPES)
    per_run = 2 * len(schedule.rows)  # at step 5 for its shape, at step 6 for that of step 5
    assert summary.recomputed == {OTHER_SHAPES: 2 * per_run}
    assert summary.reused == 2 * (schedule.reused - per_run)


class DroppingTextToy(DualStreamToy):
    """Drops tokens of its second stream alone in the second half."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        c, h = self.condition(t, y), self.x_embedder(x)
        n = 3 if float(t[0]) > 600 else 2
        text = self.y_embedder(y)[:, None].expand(-1, n, -1) + torch.arange(n)[:, None]
        for block in self.blocks:
            text, h = block(h, text, c)
        out: Tensor = self.head(h) + text.mean(dim=1, keepdim=True)
        return out


class PackedAttention(Attention):
    """Takes its streams in a list."""

    def forward(self, streams: list[Tensor], c: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(torch.cat(streams, dim=1))


class PackedBlock(Block):
    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.attn = PackedAttention(dim)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        h = self.norm1(x) + c[:, None]
        x = x + self.attn([h[:, :1], h[:, 1:]], c)
        return x + self.mlp(self.norm2(x))


class PackedToy(DroppingToy):
    block = PackedBlock
    kept = staticmethod(PATTERNS["from step 4"])


class ChangingTypeToy(Toy):
    """Runs its blocks in double precision in the second half."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        dtype = torch.float32 if float(t[0]) > 600 else torch.float64
        c, h = self.condition(t, y).to(dtype), self.x_embedder(x).to(dtype)
        self.blocks.to(dtype)
        for block in self.blocks:
            h = block(h, c)
        out: Tensor = self.head(h.float())
        return out


@pytest.mark.parametrize(
    ("kind", "interval"), [(DroppingTextToy, 3), (PackedToy, 3), (ChangingTypeToy, 3)]
)
def test_what_changes_is_not_the_shape_of_the_first_tensor(kind: type[Toy], interval: int) -> None:
    toy = made(kind)
    assert_as_by_hand(toy, uniform(toy, interval), OTHER_SHAPES)


def test_tokens_of_a_second_stream_dropped_inside_the_model_and_reused_blocks() -> None:
    """With no base of its shape, what a block added would be returned as what it is."""
    toy = made(DroppingTextToy)
    shapes: list[tuple[Any, Any]] = []
    for block in toy.blocks:
        block.register_forward_hook(lambda _, x, out: shapes.append((x[1].shape, out[0].shape)))
    with sc.cached(toy, uniform(toy, 3, granularity="block")):
        sample(toy)
    assert all(given == returned for given, returned in shapes)


def test_a_batch_that_changes_inside_and_outside_at_once() -> None:
    class Halving(HalvingToy):
        kept = staticmethod(PATTERNS["from step 4"])

    toy = made(Halving)
    with sc.cached(toy, uniform(toy, 4)) as run:
        got = [sample(toy, batch=batch) for batch in (1, 3, 2)]
    for one, batch in zip(got, (1, 3, 2), strict=True):
        with sc.cached(toy, uniform(toy, 4)):
            assert same(one, sample(toy, batch=batch))
    assert run.summary().finished == 3


# --------------------------------------------------------------- layers that run now and then


class NowAndThenToy(Toy):
    """Runs its second block at some times only."""

    runs: Callable[[int], bool] = staticmethod(lambda step: True)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        c, h = self.condition(t, y), self.blocks[0](self.x_embedder(x), self.condition(t, y))
        if self.runs(8 - round(float(t[0]) / 125)):
            h = self.blocks[1](h, c)
        out: Tensor = self.head(h)
        return out


RUNS: dict[str, Callable[[int], bool]] = {
    "the first half": lambda step: step < 4,
    "the second half": lambda step: step >= 4,
    "the last three": lambda step: step >= 5,
    "every other step": lambda step: step % 2 == 0,
    "every third step": lambda step: step % 3 == 0,
    "all but one that computes": lambda step: step != 4,
    "all but one that reuses": lambda step: step != 5,
}


@pytest.mark.parametrize("when", RUNS)
@pytest.mark.parametrize("granularity", ["auto", "block"])
@pytest.mark.parametrize("interval", [2, 4])
def test_a_layer_that_runs_in_some_steps_only(
    when: str, granularity: Any, interval: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NowAndThenToy, "runs", staticmethod(RUNS[when]))
    toy = made(NowAndThenToy)
    schedule = uniform(toy, interval, granularity=granularity)
    assert_as_by_hand(toy, schedule, NOTHING_KEPT)


def test_a_layer_that_runs_in_some_steps_only_is_never_planned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(NowAndThenToy, "runs", staticmethod(RUNS["every other step"]))
    toy = made(NowAndThenToy)
    calibration = calibrated(toy, lambda i: sample(toy))
    assert paths(calibration.layers) == ["blocks.0.attn", "blocks.0.mlp"]
    assert calibration.provenance["left_out"] == "blocks.1.attn, blocks.1.mlp"


class RepeatingToy(Toy):
    """Runs its second block a number of times that differs between steps."""

    uses: tuple[int, ...] = (1,) * STEPS

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        c, h = self.condition(t, y), self.x_embedder(x)
        h = self.blocks[0](h, c)
        for i in range(self.uses[8 - round(float(t[0]) / 125)]):
            h = self.blocks[1](h + i, c)
        out: Tensor = self.head(h)
        return out


@pytest.mark.parametrize(
    "uses", [(1, 2, 3, 1, 2, 3, 1, 2), (3, 2, 1, 3, 2, 1, 3, 2), (0, 1, 2, 2, 0, 1, 0, 3)], ids=str
)
@pytest.mark.parametrize("granularity", ["auto", "block"])
@pytest.mark.parametrize(("predictor", "interval"), [("hold", 2), ("hold", 4), ("taylor", 2)])
def test_a_layer_called_a_varying_number_of_times(
    uses: tuple[int, ...],
    granularity: Any,
    predictor: str,
    interval: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each use of a call reuses what the same use kept; one that kept nothing computes."""
    monkeypatch.setattr(RepeatingToy, "uses", uses)
    toy = made(RepeatingToy)
    schedule = uniform(toy, interval, granularity=granularity, predictor=predictor)
    assert_as_by_hand(toy, schedule, NOTHING_KEPT)


@pytest.mark.parametrize("why", ["it did not run", "its inputs had another shape"])
def test_what_found_no_use_at_the_last_step_is_not_held_beyond_it(
    why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if why == "it did not run":
        monkeypatch.setattr(NowAndThenToy, "runs", staticmethod(lambda step: step < STEPS - 1))
        toy = made(NowAndThenToy)
    else:
        last = times()[-1]
        monkeypatch.setattr(DroppingToy, "kept", staticmethod(lambda t: 3 if t == last else TOKENS))
        toy = made(DroppingToy)
    with sc.cached(toy, uniform(toy, 2)) as run:
        sample(toy)
        assert run.summary().finished == 1
        assert run.summary().held_bytes == 0


# ------------------------------------------------------------------------- modules in two places


def shared_block() -> Toy:
    toy: Toy = made(Toy, depth=3)
    toy.blocks[2] = toy.blocks[0]
    return toy


def shared_layers() -> Toy:
    toy: Toy = made(Toy, depth=3)
    toy.blocks[2].attn = toy.blocks[0].attn
    toy.blocks[1].mlp = toy.blocks[0].mlp
    return toy


def shared_weights() -> Toy:
    toy: Toy = made(Toy, depth=3)
    for name in ("attn.qkv", "attn.proj", "mlp.fc1"):
        first = toy.blocks[0].get_submodule(name)
        toy.blocks[1].get_submodule(name).weight = first.weight
    return toy


def shared_list() -> Toy:
    toy: Toy = made(Toy, depth=3)
    toy.same_blocks = toy.blocks
    return toy


SHARING: dict[str, tuple[Callable[[], Toy], list[str]]] = {
    "a block": (shared_block, [f"blocks.{i}.{x}" for i in (0, 1) for x in ("attn", "mlp")]),
    "weights": (shared_weights, [f"blocks.{i}.{x}" for i in range(3) for x in ("attn", "mlp")]),
    "a list": (shared_list, [f"blocks.{i}.{x}" for i in range(3) for x in ("attn", "mlp")]),
}


@pytest.mark.parametrize("what", SHARING)
@pytest.mark.parametrize("granularity", ["auto", "block"])
@pytest.mark.parametrize("interval", [2, 3])
def test_modules_in_two_places(what: str, granularity: Any, interval: int) -> None:
    """One layer, with a value for each of its uses."""
    build_toy, expected = SHARING[what]
    toy = build_toy()
    assert paths(sc.find_layers(toy)) == expected
    schedule = uniform(toy, interval, granularity=granularity)
    by_hand = ByHand(toy, schedule)
    with sc.cached(toy, uniform(toy, 1, granularity=granularity)):
        assert same(sample(toy), sample(copy.deepcopy(toy)))
    with unaltered(toy), sc.cached(toy, schedule) as run:
        assert same(sample(toy), sample(by_hand.toy, begin=by_hand.begin))
    assert run.summary().reused == (STEPS - len(range(0, STEPS, interval))) * (
        3 if granularity == "block" else 6
    )
    assert run.summary().never_ran == ()


def test_layers_in_two_blocks_run_as_they_should() -> None:
    toy = shared_layers()
    distinct = {id(toy.get_submodule(layer.path)): layer for layer in reversed(sc.find_layers(toy))}
    schedule = uniform(toy, 3, layers=list(distinct.values()))
    assert len(schedule.rows) == 4
    by_hand = ByHand(toy, schedule)
    expected = sample(by_hand.toy, begin=by_hand.begin)
    for one in (schedule, uniform(toy, 3)):
        with unaltered(toy), warnings.catch_warnings():
            warnings.simplefilter("ignore", sc.SmoothCacheWarning)
            with sc.cached(toy, one) as run:
                assert same(sample(toy), expected)
        assert run.summary().reused == 5 * 6


def test_layers_in_two_blocks_are_found_once() -> None:
    toy = shared_layers()
    layers = sc.find_layers(toy)
    assert len({id(toy.get_submodule(x.path)) for x in layers}) == len(layers)
    with sc.cached(toy, uniform(toy)) as run:
        sample(toy)
    assert run.summary().never_ran == ()


def test_two_rows_for_one_module_are_refused() -> None:
    toy, untied = shared_block(), made(Toy, depth=3)
    layers = tuple(sc.find_layers(untied))
    rows = {x.path: sc.Row.uniform(STEPS, 2 + x.path.startswith("blocks.2")) for x in layers}
    with refused(toy, sc.ScheduleMismatchError, r"blocks\.0.*blocks\.2"):
        sc.enable(toy, sc.Schedule(STEPS, rows, layers))


# ---------------------------------------------------------------------------------------- hooks


def doubled(_: nn.Module, args: Any, output: Any) -> Any:
    return pytree.tree_map(lambda leaf: 2 * leaf, output)


def shifted(_: nn.Module, args: Any) -> Any:
    return pytree.tree_map(lambda leaf: leaf + 0.25 if leaf.ndim > 2 else leaf, args)


def shifted_by_name(_: nn.Module, args: Any, kwargs: Any) -> Any:
    return shifted(_, args), shifted(_, kwargs)


@every_toy
@pytest.mark.parametrize("where", ["blocks.0", "blocks.1.attn", "blocks.0.mlp", ""])
@pytest.mark.parametrize("interval", [1, 3])
def test_hooks_that_change_what_goes_in_and_out(toy_name: str, where: str, interval: int) -> None:
    """They run at a reuse as they do otherwise, on what is reused."""
    toy = build(toy_name, depth=2)
    if where == "blocks.0.mlp":
        where = {"parallel-block": "blocks.0.linear2", "dual": "blocks.0.ff"}.get(toy_name, where)
    module = toy.get_submodule(where)
    module.register_forward_hook(doubled)
    module.register_forward_pre_hook(shifted_by_name, with_kwargs=True)
    schedule = uniform(toy, interval, granularity="layer")
    by_hand = ByHand(toy, schedule)
    expected = sample(by_hand.toy, begin=by_hand.begin)
    with unaltered(toy), sc.cached(toy, schedule) as run:
        assert same(sample(toy), expected)
    assert run.summary().reused >= schedule.reused
    assert run.summary().recomputed == {}


@pytest.mark.parametrize("granularity", ["block", "model"])
def test_hooks_on_blocks_and_models(granularity: Any) -> None:
    toy = build("single", depth=2)
    for module in (toy, *toy.blocks):
        module.register_forward_hook(doubled)
        module.register_forward_pre_hook(shifted)
    schedule = uniform(toy, 3, granularity=granularity)
    by_hand = ByHand(toy, schedule)
    expected = sample(by_hand.toy, begin=by_hand.begin)
    with unaltered(toy), sc.cached(toy, schedule) as run:
        assert same(sample(toy), expected)
    assert run.summary().reused == schedule.reused


def test_a_hook_that_fails_breaks_the_generation_off() -> None:
    toy = build("single", depth=2)
    schedule = uniform(toy, 4)
    with sc.cached(toy, schedule):
        fresh = sample(toy)

    def fail(module: nn.Module, args: Any, output: Any) -> None:
        if fails[0]:
            raise KeyError("mine")

    fails = [False]
    toy.blocks[1].mlp.register_forward_hook(fail)

    def generate(failing_step: int | None) -> list[Tensor]:
        def begin(step: int, branch: int) -> None:
            fails[0] = step == failing_step

        return sample(toy, begin=begin)

    with unaltered(toy), sc.cached(toy, schedule) as run:
        for failing_step in (0, 3, 4, 5):
            with pytest.raises(KeyError, match="mine"):
                generate(failing_step)
            assert run.summary().held_bytes == 0
            assert same(generate(None), fresh)
    assert (run.summary().finished, run.summary().broken_off) == (4, 4)


# ------------------------------------------------------------------- what must never be a layer

CONDITIONING = re.compile(
    r"t_embedder|time_(?!attn).*|.*_embed|.*_embed_.*|.*_embeds?|.*_embedd(er|ing)s?|embed(ding)?s?"
    r"|norm.*|.*_norm\d*|adaLN.*|ada_?ln.*|.*modulation.*|scale_shift.*|pos_.*|rope"
)


@pytest.mark.parametrize("name", all_models())
@pytest.mark.filterwarnings("ignore")
def test_conditioning_is_never_a_layer_of_a_real_architecture(name: str) -> None:
    model = all_models()[name].build()
    for granularity in ("auto", "layer", "block"):
        try:
            layers = sc.find_layers(model, granularity=granularity)  # type: ignore[arg-type]
        except sc.LayersNotFoundError:
            assert granularity == "layer"
            continue
        for layer in layers:
            parts = layer.path.split(".")
            assert not [part for part in parts if CONDITIONING.fullmatch(part)], layer.path
            assert layer.path == layer.block or layer.path.startswith(f"{layer.block}.")


def test_the_names_of_conditioning_are_seen() -> None:
    """So that the test above can fail."""
    for name in (
        "t_embedder",
        "time_embed",
        "time_mlp",
        "x_embedder",
        "pos_embed",
        "text_embedding",
        "patch_embed",
        "norm1",
        "norm_out",
        "adaLN_modulation",
        "modulation",
        "img_modulation",
        "scale_shift_table",
    ):
        assert CONDITIONING.fullmatch(name), name
    for name in ("attn", "temporal_attn", "time_attn", "mlp", "ff", "blocks", "0", "transformer"):
        assert not CONDITIONING.fullmatch(name), name
