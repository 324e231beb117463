"""Calibration against brute force: outputs recorded, errors computed from their definition."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from support.reference import STEPS, same, sample, times
from support.toys import TOKENS, TOYS, WIDTH, Toy, build
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import smoothcache as sc
from smoothcache.model.costs import MacCounter

every_toy = pytest.mark.parametrize("toy_name", TOYS)
every_calls = pytest.mark.parametrize("calls", [1, 2])


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def toy() -> Toy:
    return build("single", depth=2)


def calibrated(toy: nn.Module, generate: Callable[[int], Any], **options: Any) -> sc.Calibration:
    settings: dict[str, Any] = {"num_samples": 2, "max_gap": 3, "progress": False, **options}
    return sc.calibrate(toy, generate, **settings)


class Recording:
    """All outputs of all layers of a toy: [path][step] is a list over calls, uses and tensors."""

    def __init__(self, toy: Toy) -> None:
        self.outputs: dict[str, list[list[Tensor]]] = {x.path: [] for x in sc.find_layers(toy)}
        self._toy = toy
        self._branch = 0

    def run(self, **options: Any) -> Recording:
        replaced = []
        for path in self.outputs:
            module = self._toy.get_submodule(path)
            replaced.append((module, module.__dict__.get("forward")))
            module.forward = self._watching(path, module.forward)
        sample(self._toy, begin=self._begin, **options)
        for module, forward in replaced:
            del module.__dict__["forward"]
            if forward is not None:
                module.forward = forward
        return self

    def _begin(self, step: int, branch: int) -> None:
        if branch == 0:
            for steps in self.outputs.values():
                steps.append([])

    def _watching(self, path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def watching(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            self.outputs[path][-1] += [
                x.double().clone() for x in pytree.tree_leaves(output) if isinstance(x, Tensor)
            ]
            return output

        return watching

    def errors(self, max_gap: int, tokens: slice = slice(None)) -> np.ndarray[Any, Any]:
        """E(t, k) = |L_t - L_(t-k)| / |L_t|, L1 norms over everything a layer returns in a step."""

        def flat(tensors: list[Tensor]) -> Tensor:
            return torch.cat([x[..., tokens, :].flatten() for x in tensors])

        table = []
        for steps in self.outputs.values():
            values = [flat(tensors) for tensors in steps]
            table.append(
                [
                    [
                        float((v - values[t - k]).abs().sum() / v.abs().sum()) if t >= k else np.nan
                        for t, v in enumerate(values)
                    ]
                    for k in range(1, max_gap + 1)
                ]
            )
        return np.array(table)


@every_toy
@every_calls
def test_errors_are_those_of_the_definition(toy_name: str, calls: int) -> None:
    toy = build(toy_name, depth=2)
    got = calibrated(toy, lambda i: sample(toy, seed=i, calls=calls), num_samples=3)
    expected = [Recording(toy).run(seed=i, calls=calls).errors(3) for i in range(3)]
    np.testing.assert_allclose(got.errors, np.stack(expected), rtol=1e-4)
    assert got.timesteps == tuple(times())
    assert (got.num_samples, got.max_gap, got.num_steps) == (3, 3, STEPS)
    assert got.solver is None and got.tokens is None


def test_errors_over_a_batch(toy: Toy) -> None:
    got = calibrated(toy, lambda i: sample(toy, seed=i, batch=3), num_samples=1)
    expected = Recording(toy).run(seed=0, batch=3).errors(3)
    np.testing.assert_allclose(got.errors[0], expected, rtol=1e-4)


def test_one_gap_and_one_sample(toy: Toy) -> None:
    got = calibrated(toy, lambda i: sample(toy), num_samples=1, max_gap=1)
    np.testing.assert_allclose(got.errors[0], Recording(toy).run().errors(1), rtol=1e-4)
    assert np.isnan(got.curve(gap=1).low).all()


def test_the_interval_is_that_of_student(toy: Toy) -> None:
    got = calibrated(toy, lambda i: sample(toy, seed=i), num_samples=3)
    per_sample = [
        np.nanmean(Recording(toy).run(seed=i).errors(3)[:, 1, 2:], axis=0) for i in range(3)
    ]
    curve = got.curve(gap=2)
    np.testing.assert_allclose(curve.mean[2:], np.mean(per_sample, axis=0), rtol=1e-4)
    half = 4.302653 * np.std(per_sample, axis=0, ddof=1) / np.sqrt(3)
    np.testing.assert_allclose((curve.high - curve.low)[2:] / 2, half, rtol=1e-3)


@pytest.mark.parametrize(
    ("tokens", "chosen"), [(2, slice(None, None, 3)), (6, slice(None)), (99, slice(None))]
)
def test_fewer_tokens(toy: Toy, tokens: int, chosen: slice) -> None:
    got = calibrated(toy, lambda i: sample(toy), num_samples=1, tokens=tokens)
    expected = Recording(toy).run().errors(3, chosen)
    np.testing.assert_allclose(got.errors[0], expected, rtol=1e-4)
    assert got.tokens == tokens
    everything = calibrated(toy, lambda i: sample(toy), num_samples=1)
    assert got.peak_bytes * TOKENS == everything.peak_bytes * len(range(TOKENS)[chosen])


def test_more_gaps_than_steps(toy: Toy) -> None:
    """What cannot be measured is NaN, and never planned."""
    got = calibrated(toy, lambda i: sample(toy, 3), max_gap=5)
    assert got.errors.shape == (2, 4, 5, 3)
    assert np.isnan(got.errors[:, :, 2:]).all()
    np.testing.assert_allclose(
        got.errors[0, :, :2], Recording(toy).run(num_steps=3).errors(2), rtol=1e-4
    )
    assert sc.plan(got, alpha=100.0).table().sum() == 2 * 4


def test_a_layer_that_returns_nothing_but_zeros(toy: Toy) -> None:
    for parameter in toy.blocks[0].attn.proj.parameters():
        parameter.zero_()
    got = calibrated(toy, lambda i: sample(toy))
    assert (got.errors[:, 0, 0, 1:] == 0).all()


@every_toy
@every_calls
@pytest.mark.parametrize("max_gap", [1, 2, 3])
def test_at_most_max_gap_outputs_are_kept(toy_name: str, calls: int, max_gap: int) -> None:
    toy = build(toy_name, depth=2)
    got = calibrated(toy, lambda i: sample(toy, seed=i, calls=calls), max_gap=max_gap)
    one_step = [steps[0] for steps in Recording(toy).run(num_steps=1, calls=calls).outputs.values()]
    size = sum(x.numel() * 4 for tensors in one_step for x in tensors)
    assert got.peak_bytes == max_gap * size


def test_outputs_that_the_model_writes_into_are_compared_as_they_were() -> None:
    toy = build("in-place", depth=2)
    got = calibrated(toy, lambda i: sample(toy), num_samples=1)
    np.testing.assert_allclose(got.errors[0], Recording(toy).run().errors(3), rtol=1e-4)


@every_calls
def test_the_macs_of_the_layers_and_of_the_whole(toy: Toy, calls: int) -> None:
    got = calibrated(toy, lambda i: sample(toy, calls=calls, batch=2))
    n = 2 * TOKENS * calls
    attention = n * (4 * WIDTH * WIDTH + 2 * TOKENS * WIDTH)
    feed_forward = n * 8 * WIDTH * WIDTH
    assert [layer.macs for layer in got.layers] == [attention, feed_forward] * 2
    per_call = 2 * calls  # modulation of both blocks, and the embedding of the time
    rest = 2 * n * WIDTH * WIDTH + per_call * (2 * 4 * WIDTH * WIDTH + WIDTH + WIDTH * WIDTH)
    assert got.total_macs == 2 * (attention + feed_forward) + rest


@every_toy
@every_calls
def test_the_total_is_what_a_counter_counts(toy_name: str, calls: int) -> None:
    toy = build(toy_name, depth=2)
    got = calibrated(toy, lambda i: sample(toy, calls=calls), num_samples=1)
    with MacCounter() as counter:
        sample(toy, 1, calls=calls)
    assert got.total_macs == counter.total
    in_layers = sum(layer.macs or 0 for layer in got.layers)
    assert all(layer.macs for layer in got.layers)
    assert in_layers < got.total_macs
    assert got.errors.shape[1] == len(sc.find_layers(toy))


@every_toy
def test_samples_are_what_they_are_without(toy_name: str) -> None:
    toy = build(toy_name, depth=2)
    before = {path: (type(m), dict(m.__dict__)) for path, m in toy.named_modules()}
    seen: list[list[Tensor]] = []
    calibrated(toy, lambda i: seen.append(sample(toy, seed=i, calls=2)), trajectory=False)
    assert {path: (type(m), dict(m.__dict__)) for path, m in toy.named_modules()} == before
    assert same(seen, [sample(toy, seed=i, calls=2) for i in range(2)])


class Readings(TorchDispatchMode):
    """Counts the operators that hand a value on the device to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.count += func.overloadpacket.__name__ in ("_local_scalar_dense", "is_nonzero", "equal")
        return func(*args, **(kwargs or {}))


def test_nothing_is_read_while_sampling(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[int] = []
    to_cpu = Tensor.cpu
    monkeypatch.setattr(Tensor, "cpu", lambda x, *args: (copies.append(1), to_cpu(x, *args))[1])
    with Readings() as readings:
        calibrated(toy, lambda i: sample(toy, seed=i), num_samples=3, trajectory=False)
    assert readings.count == 0
    assert len(copies) == 3  # once for each sample


def test_progress_is_shown_when_asked_for(toy: Toy, capfd: pytest.CaptureFixture[str]) -> None:
    calibrated(toy, lambda i: sample(toy))
    assert capfd.readouterr() == ("", "")
    calibrated(toy, lambda i: sample(toy), progress=True)
    assert "2/2" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_samples": 0}, "num_samples must be an integer of at least 1, got 0"),
        ({"num_samples": 1.5}, "num_samples .* got 1.5"),
        ({"num_samples": True}, "num_samples .* got True"),
        ({"max_gap": 0}, "max_gap must be an integer of at least 1, got 0"),
        ({"max_gap": -2}, "max_gap .* got -2"),
        ({"tokens": 0}, "tokens must be an integer of at least 1, got 0"),
    ],
)
def test_arguments_are_checked_first(toy: Toy, options: dict[str, Any], words: str) -> None:
    ran: list[int] = []
    with pytest.raises(sc.InvalidArgumentError, match=words):
        calibrated(toy, ran.append, **options)
    assert ran == []


def test_a_sample_that_cannot_be_called(toy: Toy) -> None:
    with pytest.raises(sc.InvalidArgumentError, match=r"sample must be a function.*Tensor"):
        calibrated(toy, torch.zeros(1))  # type: ignore[arg-type]


def refused(toy: Toy, generate: Callable[[int], Any], words: str, **options: Any) -> None:
    """Refused in these words, and the model is as it was."""
    classes = [type(module) for module in toy.modules()]
    with pytest.raises(sc.CalibrationError, match=words):
        calibrated(toy, generate, **options)
    assert [type(module) for module in toy.modules()] == classes
    sample(toy)


def test_a_sample_that_never_runs_the_model(toy: Toy) -> None:
    refused(toy, lambda i: None, r"sample\(0\) never ran the model")
    refused(toy, lambda i: sample(toy) if i == 0 else None, r"sample\(1\) never ran the model")


def test_a_varying_number_of_steps(toy: Toy) -> None:
    words = r"sample\(1\) ran 9 steps, but earlier samples ran 8"
    refused(toy, lambda i: sample(toy, STEPS + i), words)


def test_two_generations_in_a_sample(toy: Toy) -> None:
    refused(toy, lambda i: (sample(toy), sample(toy)), r"sample\(0\) started a second generation")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_outputs_that_are_not_finite(toy: Toy, value: float) -> None:
    def generate(i: int) -> None:
        def spoil(step: int, branch: int) -> None:
            if (i, step) == (1, 5):
                toy.blocks[1].mlp.fc2.bias[3] = value

        toy.blocks[1].mlp.fc2.bias.zero_()
        sample(toy, begin=spoil)

    words = r"'blocks.1.mlp' is not finite at step 5 of sample\(1\)"
    with pytest.raises(sc.CalibrationError, match=words):
        calibrated(toy, generate)
    assert type(toy) is Toy


def test_an_exception_of_the_sample_passes_through(toy: Toy) -> None:
    classes = [type(module) for module in toy.modules()]

    def generate(i: int) -> None:
        sample(toy, 3)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        calibrated(toy, generate)
    assert [type(module) for module in toy.modules()] == classes
    assert calibrated(toy, lambda i: sample(toy)).num_samples == 2


def test_layers_that_do_not_run_at_every_step_are_left_out() -> None:
    class Skipping(Toy):
        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            c, h = self.condition(t, y), self.x_embedder(x)
            for block in list(self.blocks)[: 2 if float(t[0]) > 500 else 1]:
                h = block(h, c)
            out: Tensor = self.head(h)
            return out

    toy = Skipping(depth=2).eval()
    got = calibrated(toy, lambda i: sample(toy))
    assert [layer.path for layer in got.layers] == ["blocks.0.attn", "blocks.0.mlp"]
    assert got.provenance["left_out"] == "blocks.1.attn, blocks.1.mlp"
    with sc.cached(toy, sc.plan(got, alpha=100.0)) as run:
        sample(toy)
    assert run.summary().reused == sum(
        row.computed.count(False) for row in run.schedule.rows.values()
    )


def test_a_saved_calibration_plans_the_same(toy: Toy, tmp_path: Any) -> None:
    got = calibrated(toy, lambda i: sample(toy, seed=i))
    got.save(tmp_path / "c.safetensors")
    loaded = sc.Calibration.load(tmp_path / "c.safetensors")
    for alpha in (0.01, 0.1, 1.0):
        assert sc.plan(got, alpha=alpha) == sc.plan(loaded, alpha=alpha)
