"""The fair comparison, on a toy that turns its tokens into images."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from support.toys import Toy, build
from torch import Tensor

import smoothcache as sc
from smoothcache.comparison.compare import Variant, compare, fewer_steps
from smoothcache.comparison.result import REFERENCE, Comparison
from smoothcache.errors import InvalidArgumentError, MissingPackageError, ScheduleMismatchError
from smoothcache.metrics.audio import WINDOW, signal_to_noise_ratio
from smoothcache.metrics.report import ReportRow

STEPS = 8


@pytest.fixture(scope="module")
def toy() -> Toy:
    return build("single")


def sampler(toy: Toy, batch: int = 2) -> Callable[[int, int], Tensor]:
    def sample(i: int, num_steps: int) -> Tensor:
        latents = toy.generate(num_steps, seed=i, batch=batch, tokens=16)
        return latents.reshape(batch, 1, 16, 16).sigmoid()

    return sample


def every(toy: Toy, interval: int, **settings: object) -> sc.Schedule:
    return sc.Schedule.uniform(toy, STEPS, interval, **settings)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def compared(toy: Toy) -> Comparison:
    variants = [
        Variant("every 2nd", every(toy, 2)),
        Variant("extrapolated", every(toy, 2, predictor="taylor")),
        Variant("every 4th", every(toy, 4)),
    ]
    scores = {"class_accuracy": lambda images: len(images) / 100}
    return compare(
        toy, sampler(toy), variants, num_steps=STEPS, num_samples=3, scores=scores, progress=False
    )


def test_schedules_of_one_cost_share_their_row_of_fewer_steps(compared: Comparison) -> None:
    names = [row.name for row in compared.rows]
    at_half = round(STEPS * compared.row("every 2nd").compute)  # type: ignore[operator]
    at_quarter = round(STEPS * compared.row("every 4th").compute)  # type: ignore[operator]
    rivals = [f"{at_half} steps", f"{at_quarter} steps"]
    assert names == [
        REFERENCE, "every 2nd", "extrapolated", rivals[0], "every 4th", rivals[1]
    ]  # fmt: skip
    assert dict(compared.rivals) == {
        "every 2nd": rivals[0], "extrapolated": rivals[0], "every 4th": rivals[1]
    }  # fmt: skip
    assert compared.row(rivals[0]).steps == at_half


def test_rows_hold_what_was_measured(toy: Toy, compared: Comparison) -> None:
    reference, half = compared.row(REFERENCE), compared.row("every 2nd")
    assert (reference.compute, reference.time, reference.relative_error) == (1.0, 1.0, 0.0)
    assert reference.psnr == math.inf and reference.ssim == pytest.approx(1)
    assert reference.peak_bytes == 0 and half.peak_bytes and half.peak_bytes > 0
    assert half.psnr is not None and 0 < half.psnr < math.inf
    assert half.class_accuracy == 0.06, "scores see all images of a row"
    for row in compared.rows:
        if row.name.endswith("steps"):
            assert row.compute == row.steps / STEPS  # type: ignore[operator]


def test_the_cost_is_that_of_the_plan(toy: Toy, compared: Comparison) -> None:
    calibration = sc.calibrate(
        toy, lambda i: sampler(toy)(i, STEPS), num_samples=1, max_gap=1, progress=False
    )
    planned = sc.planners.plan_uniform(calibration, interval=2).compute
    assert compared.row("every 2nd").compute == pytest.approx(planned)


def test_images_are_those_of_the_same_seeds(toy: Toy, compared: Comparison) -> None:
    sample = sampler(toy)
    plain = torch.cat([sample(i, STEPS) for i in range(3)])
    assert torch.equal(compared.images[REFERENCE], plain)
    with sc.cached(toy, every(toy, 4)):
        cached = torch.cat([sample(i, STEPS) for i in range(3)])
    assert torch.equal(compared.images["every 4th"], cached)
    assert list(compared.images) == [row.name for row in compared.rows]


def test_a_schedule_that_computes_everything_is_set_beside_the_reference(toy: Toy) -> None:
    result = compare(
        toy, sampler(toy), [Variant("all", every(toy, 1))], num_steps=STEPS, progress=False
    )
    assert [row.name for row in result.rows] == [REFERENCE, "all"]
    assert dict(result.rivals) == {"all": REFERENCE}
    assert result.row("all").psnr == math.inf and result.row("all").compute == 1
    assert result.duels()[0].is_won is None
    assert "no closer" in result.verdict()[0] and "0 of 1. Use fewer steps" in result.verdict()[1]


def test_a_plain_variant_serves_as_rival(toy: Toy) -> None:
    half = compare(
        toy, sampler(toy), [Variant("a", every(toy, 2))], num_steps=STEPS, progress=False
    ).rows[-1]
    variants = [Variant("a", every(toy, 2)), Variant("fewer", num_steps=half.steps)]
    result = compare(toy, sampler(toy), variants, num_steps=STEPS, progress=False)
    assert [row.name for row in result.rows] == [REFERENCE, "a", "fewer"]
    assert result.rivals["a"] == "fewer"


def test_without_schedules_there_is_nothing_to_judge(toy: Toy) -> None:
    result = compare(
        toy, sampler(toy), [Variant("fewer", num_steps=4)], num_steps=STEPS, progress=False
    )
    assert result.verdict() == [] and result.report().notes == ()


def test_layers_that_had_to_run_count_and_are_told(toy: Toy) -> None:
    def growing(i: int, num_steps: int) -> Tensor:
        """Its batch changes at every step, so that nothing can be reused."""
        x = torch.randn(num_steps, 16, 16, generator=torch.Generator().manual_seed(i))
        for step in range(num_steps):
            y = torch.zeros(step + 1, dtype=torch.long)
            t = torch.full((step + 1,), 1000.0 - step)
            x[: step + 1] -= 0.1 * toy(x[: step + 1], t, y)
        return x[:1, None].sigmoid()

    with pytest.warns(sc.SmoothCacheWarning, match="reused nothing"):
        result = compare(
            toy, growing, [Variant("half", every(toy, 2))], num_steps=STEPS, progress=False
        )
    assert result.row("half").compute == 1
    assert "half: 24 layer calls were to reuse but had to compute" in result.report().notes[0]


def made_up(own: Tensor, rival: Tensor, **scores: float) -> Comparison:
    """A comparison of one schedule with errors of these sizes at all pixels of each image."""
    images = {REFERENCE: torch.full((len(own), 1, 16, 16), 0.5)}
    for name, errors in (("cached", own), ("4 steps", rival)):
        images[name] = images[REFERENCE] + errors.reshape(-1, 1, 1, 1)
    rows = [ReportRow(REFERENCE)]
    for name in ("cached", "4 steps"):
        quality = sc.metrics.psnr(images[name], images[REFERENCE]).mean().item()
        error = sc.metrics.relative_error(images[name], images[REFERENCE]).mean().item()
        rows.append(ReportRow(name, psnr=quality, relative_error=error, **scores))
    return Comparison(tuple(rows), images, {"cached": "4 steps"})


SMALL, LARGE = torch.tensor([0.010, 0.011, 0.012]), torch.tensor([0.10, 0.11, 0.12])


def test_a_schedule_that_pays() -> None:
    sentence, conclusion = made_up(SMALL, LARGE, class_accuracy=0.9).verdict()
    assert sentence == (
        "cached is closer to the uncached images than 4 steps at the same cost: PSNR 39.2 against "
        "19.2 dB, relative error 0.022 against 0.22, class accuracy 90.0 against 90.0 %."
    )
    assert conclusion.endswith("1 of 1. The largest gain is 20.0 dB, of cached.")


def test_a_schedule_that_does_not_pay() -> None:
    comparison = made_up(LARGE, SMALL)
    sentence, conclusion = comparison.verdict()
    assert sentence.startswith("4 steps is closer to the uncached images than cached at the same")
    assert conclusion.endswith("0 of 1. Use fewer steps instead.")
    assert comparison.duels()[0].is_won is False


def test_a_schedule_of_which_the_images_do_not_tell() -> None:
    comparison = made_up(torch.tensor([0.01, 0.03]), torch.tensor([0.03, 0.011]))
    assert comparison.duels()[0].is_won is None
    assert "no farther" in comparison.verdict()[0]


def test_one_image_has_no_interval_but_a_winner() -> None:
    (duel,) = made_up(SMALL[:1], LARGE[:1]).duels()
    assert math.isnan(duel.low) and duel.is_won is True


@pytest.mark.parametrize(
    ("compute", "steps"), [(0.5, 25), (0.345, 17), (0.001, 1), (1.0, 50), (0.49, 25), (0.05, 3)]
)
def test_fewer_steps(compute: float, steps: int) -> None:
    assert fewer_steps(compute, 50) == steps


def test_fewer_steps_needs_a_cost(toy: Toy) -> None:
    with pytest.raises(InvalidArgumentError, match="does not know its cost"):
        fewer_steps(every(toy, 2), 50)
    assert fewer_steps(replace(every(toy, 2), compute=0.5), 50) == 25
    with pytest.raises(InvalidArgumentError, match="positive fraction"):
        fewer_steps(0.0, 50)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": REFERENCE, "num_steps": 3}, "is taken"),
        ({"name": " ", "num_steps": 3}, "needs a name"),
        ({"name": "a"}, "either a schedule or a number of steps"),
        ({"name": "a", "num_steps": 0}, "at least 1"),
        ({"name": "a", "schedule": "file.json"}, "needs a Schedule, got str"),
    ],
)
def test_variants_are_checked(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        Variant(**settings)  # type: ignore[arg-type]


def test_arguments_are_checked(toy: Toy) -> None:
    four = Variant("four", num_steps=4)
    sample = sampler(toy)
    for variants, settings, message in (
        ([], {}, "at least one variant"),
        ([four, four], {}, "'four' come twice"),
        (["four"], {}, "must be Variant, got str"),
        ([four], {"num_samples": 0}, "num_samples must be"),
        ([four], {"num_steps": 0}, "num_steps must be"),
        ([four], {"scores": {"beauty": len}}, "'beauty' has no column"),
        ([four], {"scores": {"class_accuracy": 0.5}}, "must be a function"),
    ):
        settings = {"num_steps": STEPS, "progress": False, **settings}  # type: ignore[dict-item]
        with pytest.raises(InvalidArgumentError, match=message):
            compare(toy, sample, variants, **settings)  # type: ignore[arg-type]
    result = compare(toy, sample, [four], num_steps=STEPS, progress=False)
    with pytest.raises(InvalidArgumentError, match="no row 'five'; there are 'uncached', 'four'"):
        result.row("five")


def test_a_schedule_of_another_number_of_steps_is_refused(toy: Toy) -> None:
    def fixed(i: int, num_steps: int) -> Tensor:
        return sampler(toy)(i, STEPS)

    with pytest.raises(ScheduleMismatchError, match="9"):
        other = sc.Schedule.uniform(toy, 9, 2)
        compare(toy, fixed, [Variant("other", other)], num_steps=STEPS, progress=False)
    with pytest.raises(InvalidArgumentError, match="ran 8 steps, as it did when asked for 8"):
        compare(toy, fixed, [Variant("four", num_steps=4)], num_steps=STEPS, progress=False)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda images, i, steps: images[0], "must return images"),
        (lambda images, i, steps: images.byte(), "got torch.uint8"),
        (lambda images, i, steps: None, "got NoneType"),
        (lambda images, i, steps: images * 3, "got values from"),
        (lambda images, i, steps: images / 0 - images / 0, "NaN"),
        (lambda images, i, steps: images[: 1 + (steps == STEPS)], r"\[1, 1, 16, 16\], where \[2"),
        (lambda images, i, steps: images[:, :, : 16 - i], "must have the same shape"),
    ],
)
def test_images_are_checked(
    toy: Toy, spoil: Callable[[Tensor, int, int], object], message: str
) -> None:
    sample = sampler(toy)
    with pytest.raises(InvalidArgumentError, match=message):
        compare(
            toy, lambda i, steps: spoil(sample(i, steps), i, steps),  # type: ignore[arg-type, return-value]
            [Variant("four", num_steps=4)], num_steps=STEPS, num_samples=2, progress=False,
        )  # fmt: skip


def test_clips_are_compared_frame_by_frame_and_in_time(toy: Toy) -> None:
    images = sampler(toy, batch=8)
    frames = lambda i, steps: images(i, steps).unflatten(0, (2, 4))  # noqa: E731
    half = [Variant("half", every(toy, 2))]
    scores = {"colour_accuracy": lambda clips: len(clips) / 10}
    flat = compare(toy, images, half, num_steps=STEPS, progress=False).row("half")
    found = compare(toy, frames, half, num_steps=STEPS, scores=scores, progress=False)
    row, reference = found.row("half"), found.row(REFERENCE)
    assert found.images["half"].shape == (2, 4, 1, 16, 16)
    assert row.psnr == pytest.approx(flat.psnr) and row.ssim == pytest.approx(flat.ssim)
    assert reference.motion_error == 0 and row.motion_error and row.temporal_consistency
    assert flat.motion_error is None and flat.temporal_consistency is None
    assert row.accuracies == {"colour": 0.2}
    assert "clips" in found.verdict()[-1] and "colour accuracy" in found.report().header()


def test_clips_of_one_frame_do_not_move(toy: Toy) -> None:
    images = sampler(toy)
    found = compare(
        toy,
        lambda i, steps: images(i, steps)[:, None],
        [Variant("half", every(toy, 2))],
        num_steps=STEPS,
        progress=False,
    )
    assert found.row("half").motion_error is None


def sound_sampler(toy: Toy) -> Callable[[int, int], Tensor]:
    def sample(i: int, num_steps: int) -> Tensor:
        return toy.generate(num_steps, seed=i, batch=2, tokens=64).reshape(2, 1, -1)

    return sample


def test_sounds_are_compared_by_what_one_hears(toy: Toy) -> None:
    sample = sound_sampler(toy)
    scores = {
        "timbre_accuracy": lambda sounds: 0.5,
        "label_divergence": lambda sounds: float(sounds.shape[2]),
    }
    result = compare(
        toy, sample, [Variant("half", every(toy, 2))], num_steps=STEPS, num_samples=2,
        scores=scores, progress=False,
    )  # fmt: skip
    reference, half = result.row(REFERENCE), result.row("half")
    uncached = torch.cat([sample(i, STEPS) for i in range(2)])
    assert torch.equal(result.images[REFERENCE], uncached)
    expected = signal_to_noise_ratio(result.images["half"], uncached)
    assert half.snr == pytest.approx(float(expected.mean()))
    assert reference.snr == math.inf and reference.log_spectral_distance == 0
    assert half.log_spectral_distance and half.stft_distance and half.relative_error
    assert (half.psnr, half.ssim) == (None, None)
    assert dict(half.accuracies) == {"timbre": 0.5}
    assert half.label_divergence == uncached.shape[2]
    assert "SNR" in result.verdict()[0] and "the uncached sounds" in result.verdict()[0]
    rival = signal_to_noise_ratio(result.images[result.rivals["half"]], uncached)
    assert result.duels()[0].gain == pytest.approx(float((expected - rival).mean()), abs=1e-4)


@pytest.mark.parametrize("shape", [(64, 64), (3, 64, 64), (1, 1, 512), (2, 600, 2048)])
def test_neither_images_nor_sounds_are_refused(toy: Toy, shape: tuple[int, ...]) -> None:
    def sample(i: int, num_steps: int) -> Tensor:
        toy.generate(num_steps, seed=i, batch=2, tokens=16)
        return torch.zeros(shape)

    with pytest.raises(InvalidArgumentError, match=r"must return images .*, or sounds .*; got"):
        compare(toy, sample, [Variant("four", num_steps=4)], num_steps=STEPS, progress=False)


def test_the_model_is_left_as_it_was(toy: Toy) -> None:
    before = {name: type(module) for name, module in toy.named_modules()}
    with pytest.raises(RuntimeError, match="broke"):
        compare(toy, _breaks(sampler(toy)), [Variant("four", num_steps=4)], num_steps=STEPS)
    assert {name: type(module) for name, module in toy.named_modules()} == before


def _breaks(sample: Callable[[int, int], Tensor]) -> Callable[[int, int], Tensor]:
    calls = []

    def broken(i: int, num_steps: int) -> Tensor:
        calls.append(i)
        if len(calls) == 3:
            raise RuntimeError("broke")
        return sample(i, num_steps)

    return broken


@pytest.mark.parametrize("granularity", ["layer", "block", "model"])
def test_the_cost_of_a_schedule_of_any_granularity_is_counted(toy: Toy, granularity: str) -> None:
    variants = [Variant(f"every {n}", every(toy, n, granularity=granularity)) for n in (2, 4)]
    result = compare(toy, sampler(toy), variants, num_steps=STEPS, progress=False)
    fractions = {2: 1 / 2, 4: 1 / 4}
    for n, fraction in fractions.items():
        compute = result.row(f"every {n}").compute
        assert compute is not None and fraction <= compute < (1 if granularity == "layer" else 0.8)
        if granularity == "model":
            assert compute == fraction
    assert set(result.rivals) == {"every 2", "every 4"}


def test_a_schedule_that_reuses_all_there_is_has_a_cost_of_its_own(toy: Toy) -> None:
    computed = tuple(step == 0 for step in range(STEPS))
    (layer,) = sc.find_layers(toy, granularity="model")
    once = sc.Schedule(STEPS, {layer.path: sc.Row(computed)}, (layer,))
    result = compare(toy, sampler(toy), [Variant("once", once)], num_steps=STEPS, progress=False)
    assert result.row("once").compute == 1 / STEPS
    assert result.rivals == {"once": "1 step"}


@pytest.mark.parametrize("sounds", [True, False])
def test_sounds_are_compared_without_torchmetrics(
    toy: Toy, sounds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.image", None)
    images = sampler(toy)
    repeats = -(-WINDOW // 256)

    def sample(i: int, num_steps: int) -> Tensor:
        given = images(i, num_steps)
        return given.reshape(2, 1, -1).repeat(1, 1, repeats) - 0.5 if sounds else given

    variants = [Variant("half", every(toy, 2))]
    if not sounds:
        with pytest.raises(MissingPackageError, match="torchmetrics"):
            compare(toy, sample, variants, num_steps=STEPS, progress=False)
        return
    result = compare(toy, sample, variants, num_steps=STEPS, progress=False)
    assert result.row("half").snr is not None and result.row("half").psnr is None
