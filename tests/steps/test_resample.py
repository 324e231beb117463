"""Schedules and calibrations carried over to another number of steps."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from math import floor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from support.made_up import MODEL, calibration_of, calibrations, layers_of, schedules
from support.tiny_pipeline import build_pipeline

from smoothcache import cached, calibrate
from smoothcache.calibration.curves import Calibration
from smoothcache.diffusers_io.sampler import PipelineSampler
from smoothcache.errors import InvalidArgumentError
from smoothcache.planners.threshold import plan
from smoothcache.planners.uniform import plan_uniform
from smoothcache.schedule.expected_cost import compute_fraction
from smoothcache.schedule.row import Row
from smoothcache.schedule.schedule import Schedule

PUBLISHED = sorted((Path(__file__).parents[1] / "data" / "published_schedules").glob("[0-9]*.json"))
MARK = "carried over"
counts = st.integers(1, 40)
masks = st.lists(st.booleans(), max_size=39).map(lambda later: (True, *later))


@st.composite
def falling(draw: st.DrawFn, num_steps: int) -> tuple[float, ...]:
    """Timesteps from near 1000 down to near 0, unevenly spaced."""
    weights = draw(st.lists(st.integers(1, 9), min_size=num_steps + 1, max_size=num_steps + 1))
    return tuple((1000 - 1000 * np.cumsum(weights) / sum(weights))[:num_steps].tolist())


def of_row(computed: Sequence[bool], timesteps: Sequence[float] | None = None) -> Schedule:
    return Schedule(
        len(computed),
        {"attn": Row(tuple(computed))},
        timesteps=None if timesteps is None else tuple(timesteps),
    )


def mask_of(schedule: Schedule) -> tuple[bool, ...]:
    return schedule.rows["attn"].computed


def drawn(text: str) -> tuple[bool, ...]:
    return tuple(step == "#" for step in text)


def exact_rate(computed: Sequence[bool], begins: Sequence[Fraction]) -> list[Fraction]:
    """Computed steps per step between neighbouring places: each is spread until the next one."""
    at = [i for i, on in enumerate(computed) if on]
    gaps = [b - a for a, b in pairwise([*at, len(computed)])]
    rates = [Fraction(1, gap) for gap in gaps for _ in range(gap)]
    found = []
    for low, high in pairwise(begins):
        if low == high:
            found.append(rates[min(floor(low), len(computed) - 1)])
            continue
        overlaps = (
            rate * max(min(high, Fraction(i + 1)) - max(low, Fraction(i)), Fraction(0))
            for i, rate in enumerate(rates)
        )
        found.append(sum(overlaps, Fraction(0)) / (high - low))
    return found


def exact_places(old: Sequence[float], new: Sequence[float]) -> list[Fraction]:
    """Where falling timesteps lie among old ones, whose last spacing goes on to the end."""
    known = [Fraction(t) for t in old]
    known.append(known[-1] + (known[-1] - known[-2]))
    places = []
    for t in map(Fraction, new):
        i = next((i for i in range(len(old)) if t > known[i + 1]), len(old))
        if i == len(old):
            places.append(Fraction(i))
        else:
            places.append(max(i + (known[i] - t) / (known[i] - known[i + 1]), Fraction(0)))
    return [*places, Fraction(len(old))]


def even_places(num_old: int, num_new: int) -> list[Fraction]:
    return [Fraction(j * num_old, num_new) for j in range(num_new + 1)]


@given(schedule=schedules(), data=st.data())
def test_the_same_number_of_steps_changes_nothing(schedule: Schedule, data: st.DataObject) -> None:
    assert schedule.resample(schedule.num_steps) is schedule
    timed = replace(schedule, timesteps=data.draw(falling(schedule.num_steps)))
    assert timed.resample(schedule.num_steps, timesteps=timed.timesteps) is timed


@given(mask=masks, data=st.data())
def test_the_same_noise_levels_give_equal_rows(mask: tuple[bool, ...], data: st.DataObject) -> None:
    timesteps = data.draw(falling(len(mask)))
    single = np.asarray(timesteps, np.float32).tolist()
    carried = of_row(mask, timesteps).resample(len(mask), timesteps=single)
    assert mask_of(carried) == mask and carried.timesteps == tuple(single)
    assert mask_of(of_row(mask).resample(len(mask), timesteps=timesteps)) == mask


@given(mask=masks, num_steps=counts)
def test_a_step_is_computed_whenever_one_more_is_due(
    mask: tuple[bool, ...], num_steps: int
) -> None:
    assume(num_steps != len(mask))
    due, expected = Fraction(1), []
    for rate in exact_rate(mask, even_places(len(mask), num_steps)):
        expected.append(due >= 1)
        due += rate - expected[-1]
    expected[-1] |= mask[-1]
    assert mask_of(of_row(mask).resample(num_steps)) == tuple(expected)


@given(mask=masks, num_steps=counts)
def test_share_of_computed_steps_is_kept(mask: tuple[bool, ...], num_steps: int) -> None:
    carried = mask_of(of_row(mask).resample(num_steps))
    assert len(carried) == num_steps
    assert carried[0] and (carried[-1] or not mask[-1])
    wanted = sum(mask) * num_steps / len(mask)
    assert -1 <= sum(carried) - wanted <= 1 + mask[-1]


@given(mask=masks, num_steps=counts, data=st.data())
def test_share_is_kept_in_every_stretch_of_noise_levels(
    mask: tuple[bool, ...], num_steps: int, data: st.DataObject
) -> None:
    assume(len(mask) > 1)
    old, new = data.draw(falling(len(mask))), data.draw(falling(num_steps))
    carried = mask_of(of_row(mask, old).resample(num_steps, timesteps=new))
    rate = exact_rate(mask, exact_places(old, new))
    for start in range(num_steps):
        for stop in range(start + 1, num_steps + 1):
            more = sum(carried[start:stop]) - float(sum(rate[start:stop]))
            forced = (start == 0) + (stop == num_steps and mask[-1])
            # Places are exact to a ten-thousandth of a step.
            most = 1.01 if start == 0 else 2.01
            assert -most <= more <= most + forced


@given(mask=masks)
def test_doubled_and_halved_again_it_is_the_same(mask: tuple[bool, ...]) -> None:
    doubled = of_row(mask).resample(2 * len(mask))
    assert sum(mask_of(doubled)) == 2 * sum(mask)
    assert mask_of(doubled.resample(len(mask))) == mask


@given(num_steps=st.integers(1, 30), factor=st.integers(2, 6), interval=st.integers(1, 12))
def test_every_nth_step_stays_every_nth(num_steps: int, factor: int, interval: int) -> None:
    row = Row.uniform(num_steps * factor, interval, predictor="taylor")
    carried = Schedule(num_steps * factor, {"attn": row}).resample(num_steps)
    last = row.computed[-1]
    assert carried.rows["attn"] == Row.uniform(num_steps, interval, predictor="taylor", last=last)


@pytest.mark.parametrize(("first", "second"), [((981, 1), (961, 1)), ((999, 19), (999, 39))])
def test_every_second_step_stays_so_on_the_timesteps_of_ddim(
    first: tuple[int, int], second: tuple[int, int]
) -> None:
    old = np.linspace(*first, 50)
    new = np.linspace(*second, 25)
    carried = of_row(Row.uniform(50, 2).computed, old.tolist()).resample(25, timesteps=new)
    # Where the last new step is as short as an old one, it is that one, which was reused.
    assert mask_of(carried)[:-1] == Row.uniform(25, 2).computed[:-1]


@given(mask=masks, num_steps=counts, data=st.data())
def test_falling_and_rising_timesteps_are_alike(
    mask: tuple[bool, ...], num_steps: int, data: st.DataObject
) -> None:
    old, new = data.draw(falling(len(mask))), data.draw(falling(num_steps))
    fallen = of_row(mask, old).resample(num_steps, timesteps=new)
    risen = of_row(mask, [-t for t in old]).resample(num_steps, timesteps=[-t for t in new])
    assert mask_of(fallen) == mask_of(risen)


@given(mask=masks, num_steps=counts)
def test_evenly_spaced_timesteps_say_what_counting_says(
    mask: tuple[bool, ...], num_steps: int
) -> None:
    old, new = (np.linspace(1, 0, n, endpoint=False).tolist() for n in (len(mask), num_steps))
    by_timestep = of_row(mask, old).resample(num_steps, timesteps=new)
    assert mask_of(by_timestep) == mask_of(of_row(mask).resample(num_steps))


def test_equal_rows_stay_equal_and_others_apart() -> None:
    rows = {"a": Row.uniform(12, 2), "b": Row.uniform(12, 3), "c": Row.uniform(12, 2)}
    carried = Schedule(12, rows).resample(9)
    assert carried.rows["a"] == carried.rows["c"] != carried.rows["b"]


def test_noise_levels_decide_not_the_numbers_of_steps() -> None:
    # All is computed above t = 500. Most of the new steps lie below it.
    carried = of_row(drawn("#####....."), range(1000, 0, -100)).resample(
        8, timesteps=(1000, 800, 600, 400, 300, 200, 100, 50)
    )
    assert mask_of(carried) == drawn("###.....")


def test_a_run_that_begins_in_the_middle_takes_the_rest() -> None:
    mask = drawn("#####.#.##")
    carried = of_row(mask, range(1000, 0, -100)).resample(5, timesteps=range(500, 0, -100))
    assert mask_of(carried) == drawn("#.#.#")  # the step at 500, now the first, was reused


def test_timesteps_past_the_ends_take_the_ends() -> None:
    schedule = of_row(drawn("#..#"), (800, 600, 400, 200))
    carried = schedule.resample(6, timesteps=(1000, 900, 700, 500, 0, -5))
    assert mask_of(carried) == drawn("#..#.#")
    assert mask_of(schedule.resample(2, timesteps=(-5, -9))) == drawn("##")


def test_timesteps_that_come_twice_have_no_width() -> None:
    schedule = of_row(drawn("#.#."), (4, 3, 2, 1))
    carried = schedule.resample(6, timesteps=(4, 3, 3, 2, 2, 1))
    assert mask_of(carried) == drawn("#.#.#.")
    assert mask_of(of_row(drawn("#.#."), (4, 3, 3, 2)).resample(2, timesteps=(4, 2))) == drawn("#.")


def test_a_row_of_one_step_is_computed_throughout() -> None:
    assert mask_of(of_row((True,), (7,)).resample(3, timesteps=(9, 5, 1))) == (True,) * 3
    assert mask_of(of_row(drawn("#..."), (9, 7, 5, 3)).resample(1, timesteps=[4])) == (True,)


@pytest.mark.parametrize("file", PUBLISHED, ids=lambda file: file.stem)
@pytest.mark.parametrize("num_steps", [1, 25, 100])
def test_published_files_can_be_carried_over(file: Path, num_steps: int) -> None:
    schedule = Schedule.load(file)
    carried = schedule.resample(num_steps)
    assert carried.layers is None and list(carried.rows) == list(schedule.rows)
    assert carried.provenance["source"] == "published 0/1 file"
    for name, row in carried.rows.items():
        share = sum(schedule.rows[name].computed) / schedule.num_steps
        assert sum(row.computed) == pytest.approx(share * num_steps, abs=2)


def bound(**changes: Any) -> Schedule:
    settings: dict[str, Any] = {
        "num_steps": 4,
        "rows": {layer.path: Row(drawn("#.#.")) for layer in layers_of(2)},
        "layers": layers_of(2),
        "model": MODEL,
        "solver": "DDIMScheduler",
        "timesteps": (900.0, 600.0, 300.0, 0.5),
        "compute": 0.8,
        "quality": {"psnr": 41.5},
        "provenance": {"planner": "by hand"},
    }
    return Schedule(**{**settings, **changes})


def test_what_is_kept_what_is_new_and_what_is_gone() -> None:
    carried = bound().resample(2, timesteps=torch.tensor([900.0, 300.0]))
    assert (carried.layers, carried.model, carried.solver) == (layers_of(2), MODEL, "DDIMScheduler")
    assert carried.num_steps == 2 and carried.timesteps == (900.0, 300.0)
    assert dict(carried.quality) == {}
    assert dict(carried.provenance) == {
        "planner": "by hand",
        MARK: "from 4 to 2 steps by position in the noise level; not measured",
    }
    assert bound().resample(2).timesteps is None
    assert "from 4 to 2 steps" in carried.resample(6).provenance[MARK]
    assert carried.resample(6).provenance[MARK].startswith("from 2 to 6 steps")


def test_text_says_that_it_was_not_measured() -> None:
    assert "carried over, not measured" in str(bound().resample(2)).splitlines()[1]
    assert MARK not in str(bound())


@given(calibration=calibrations(max_steps=9), num_steps=counts, alpha=st.sampled_from([0.3, 0.6]))
def test_compute_is_that_of_the_new_rows(
    calibration: Calibration, num_steps: int, alpha: float
) -> None:
    carried = plan(calibration, alpha=alpha, per="block").resample(num_steps)
    known = compute_fraction(carried.rows, calibration.layers, calibration.total_macs)
    assert carried.compute == pytest.approx(known)


@pytest.mark.parametrize(
    "changes",
    [
        {"compute": None},
        {"compute": 1.0},  # contradicts the rows, so says nothing of the total
        {"layers": layers_of(2, macs=None)},
        {"layers": None, "rows": {"attn": Row(drawn("#.#."))}},
    ],
)
def test_compute_stays_unknown_where_it_does_not_follow(changes: dict[str, Any]) -> None:
    assert bound(**changes).resample(7).compute is None


def test_compute_of_everything_is_everything() -> None:
    everything = {layer.path: Row((True,) * 4) for layer in layers_of(2)}
    assert bound(rows=everything, compute=1.0).resample(7).compute == 1.0
    assert bound(compute=0.5).resample(1).compute == 1.0


def test_compute_is_not_made_up_where_the_file_contradicts_itself() -> None:
    rows = {layer.path: Row(drawn("#.##")) for layer in layers_of(2)}
    assert bound(rows=rows, compute=1e-9).resample(3).compute is None


@given(schedule=schedules(), num_steps=st.integers(1, 12))
def test_every_result_survives_its_file(
    tmp_path_factory: pytest.TempPathFactory, schedule: Schedule, num_steps: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "carried.json"
    carried = schedule.resample(num_steps)
    carried.save(path)
    assert Schedule.load(path) == carried


WRONG: list[tuple[Any, Any, list[str]]] = [
    (0, None, ["num_steps", "0"]),
    (-3, None, ["num_steps", "-3"]),
    (2.0, None, ["num_steps", "2.0"]),
    ("2", None, ["num_steps", "'2'"]),
    (True, None, ["num_steps", "True"]),
    (None, None, ["num_steps", "None"]),
    (3, (970.0, 930.0), ["2 timesteps", "3"]),
    (2, (), ["0 timesteps", "2"]),
    (2, 970.0, ["timesteps", "970.0"]),
    (2, torch.tensor(970.0), ["timesteps"]),
    (2, [[970.0], [930.0]], ["timestep", "[970.0]"]),
    (2, (970.0, None), ["timestep", "None"]),
    (2, "ab", ["timestep", "'a'"]),
    (2, (970.0, float("nan")), ["timestep", "nan"]),
    (2, (float("inf"), 930.0), ["timestep", "inf"]),
    (3, (970.0, 930.0, 950.0), ["given timesteps", "970, 930, 950"]),
    (2, (950.0, 950.0), ["given timesteps", "950, 950"]),
    (2, (930.0, 970.0), ["known timesteps fall", "given rise"]),
    (2, (0.97, 0.93), ["another unit", "0.97", "1000"]),
    (2, (2e5, 1e5), ["another unit", "100000", "1000"]),
]


@pytest.mark.parametrize(("num_steps", "timesteps", "words"), WRONG)
def test_wrong_input_is_refused(num_steps: Any, timesteps: Any, words: list[str]) -> None:
    calibration = calibration_of()
    schedule = plan_uniform(calibration, interval=2)
    for resampled in (schedule, calibration):
        with pytest.raises(InvalidArgumentError) as caught:
            resampled.resample(num_steps, timesteps=timesteps)
        assert all(word in str(caught.value) for word in words), caught.value


def test_timesteps_that_turn_back_tell_no_place() -> None:
    for known in ((3.0, 1.0, 2.0), (3.0, 3.0, 3.0)):
        schedule = of_row(drawn("#.#"), known)
        with pytest.raises(
            InvalidArgumentError, match="known timesteps neither only fall nor only rise"
        ):
            schedule.resample(2, timesteps=(3.0, 1.0))
        assert mask_of(schedule.resample(6)) == drawn("#.#.##")
    with pytest.raises(InvalidArgumentError, match="given timesteps fall and the known rise"):
        of_row(drawn("#.#"), (1.0, 2.0, 3.0)).resample(2, timesteps=(3.0, 1.0))


def noise(t: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """A smooth quantity that an output might follow."""
    return np.asarray(np.exp(-np.asarray(t) / 400.0) - np.asarray(t) / 1500.0)


def analytic(timesteps: Sequence[float], max_gap: int = 4, **others: Any) -> Calibration:
    """E(t, k) = |f(t) - f(t - k)|, another f for each of two layers and two samples."""
    level = np.asarray(timesteps, dtype=np.float64)
    outputs = np.array([[noise(level), 2 * noise(level)], [level / 900, noise(0.9 * level)]])
    errors = np.full((2, 2, max_gap, len(level)), np.nan)
    for gap in range(1, min(max_gap, len(level) - 1) + 1):
        errors[:, :, gap - 1, gap:] = np.abs(outputs[..., gap:] - outputs[..., :-gap])
    settings: dict[str, Any] = {"layers": layers_of(1), "total_macs": 100, "model": MODEL}
    return Calibration(errors=errors, timesteps=tuple(timesteps), **{**settings, **others})


@given(calibration=calibrations())
def test_a_calibration_at_its_own_steps_is_itself(calibration: Calibration) -> None:
    for timesteps in (None, calibration.timesteps):
        assert calibration.resample(calibration.num_steps, timesteps=timesteps) is calibration


@given(calibration=calibrations())
def test_errors_read_off_where_they_were_measured_are_equal(calibration: Calibration) -> None:
    assume(calibration.num_steps > 1)
    almost = tuple(t * (1 + 1e-8) for t in calibration.timesteps)
    again = calibration.resample(calibration.num_steps, timesteps=almost)
    np.testing.assert_allclose(again.errors, calibration.errors)
    assert MARK in again.provenance


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        (np.linspace(1000, 20, 50), np.linspace(1000, 40, 25)),
        (np.linspace(1000, 20, 50), np.linspace(960, 30, 37)),
        (np.linspace(1000, 20, 50), np.linspace(1000, 20, 99)),
        (np.linspace(31, 4, 50) ** 2, np.linspace(31, 5, 33) ** 2),
        (np.linspace(1000, 20, 50), np.linspace(30, 5, 40) ** 2),
    ],
)
def test_an_analytic_field_is_recovered(sign: int, old: Any, new: Any) -> None:
    calibration = analytic((sign * old).tolist())
    if sign < 0:  # the same outputs, met at timesteps that rise
        calibration = replace(analytic(old.tolist()), timesteps=tuple((-old).tolist()))
    carried = calibration.resample(len(new), timesteps=sign * new)
    exact = analytic(new.tolist(), max_gap=carried.max_gap)
    assert np.isnan(carried.errors).sum() == np.isnan(exact.errors).sum()
    np.testing.assert_allclose(carried.errors, exact.errors, rtol=0.03)


def test_without_timesteps_first_and_last_stay_where_they_are() -> None:
    calibration = analytic(np.linspace(1000, 20, 50).tolist())
    carried = calibration.resample(30)
    assert carried.timesteps == pytest.approx(np.linspace(1000, 20, 30))
    exact = analytic(carried.timesteps, max_gap=carried.max_gap)
    np.testing.assert_allclose(carried.errors, exact.errors, rtol=0.02)


def test_an_error_between_four_that_were_measured() -> None:
    # New step 3 of 7 lies at 1.8 old steps, 1.2 after step 1: between the gaps 1 and 2.
    values = np.arange(1.0, 9.0).reshape(2, 4)
    calibration = calibration_of(values, samples=1, layers=layers_of(1)[:1], max_gap=2, steps=4)
    at = [0, 0.6, 1.2, 1.8, 2.4, 2.6, 3]
    new = [1000 - 10 * x for x in at]
    carried = calibration.resample(7, timesteps=new)
    assert carried.max_gap == 2
    gap_1, gap_2 = values[0, 1] * 0.2 + values[0, 2] * 0.8, values[1, 2]  # no gap 2 at step 1
    assert carried.errors[0, 0, 1, 3] == pytest.approx(0.8 * gap_1 + 0.2 * gap_2)
    assert carried.errors[0, 0, 0, 1] == pytest.approx(0.6 * values[0, 1])


@given(calibration=calibrations(), num_steps=counts, data=st.data())
def test_every_result_is_a_calibration(
    calibration: Calibration, num_steps: int, data: st.DataObject
) -> None:
    new = data.draw(falling(num_steps))
    assume(calibration.num_steps > 1)
    old = data.draw(falling(calibration.num_steps))
    calibration = replace(calibration, timesteps=old)
    for timesteps in (None, new):
        try:
            carried = calibration.resample(num_steps, timesteps=timesteps)
        except InvalidArgumentError as error:
            assert "error curves cover gaps" in str(error)
            continue
        assert carried.num_steps == num_steps and 1 <= carried.max_gap <= calibration.max_gap
        assert carried.num_samples == calibration.num_samples
        assert carried.layers == calibration.layers
        largest, least = np.nanmax(calibration.errors), np.nanmin(carried.errors, initial=0)
        assert least >= 0 and np.nanmax(carried.errors, initial=0) <= largest * 1.101 + 1e-12


def test_fewer_steps_leave_fewer_gaps() -> None:
    calibration = analytic(np.linspace(1000, 20, 50).tolist(), max_gap=4)
    gaps = {n: calibration.resample(n).max_gap for n in (200, 50, 38, 37, 25, 24, 13)}
    assert gaps == {200: 4, 50: 4, 38: 3, 37: 3, 25: 2, 24: 1, 13: 1}


def test_steps_too_far_apart_are_refused_with_what_to_do() -> None:
    calibration = analytic(np.linspace(1000, 20, 50).tolist(), max_gap=4)
    with pytest.raises(InvalidArgumentError) as caught:
        calibration.resample(10)
    for word in ("4 of 50 steps", "5.4", "calibrate with about 10 steps", "at least 6"):
        assert word in str(caught.value)
    with pytest.raises(InvalidArgumentError, match="error curves cover gaps"):
        calibration.resample(3, timesteps=(1000, 960, 100))
    with pytest.raises(InvalidArgumentError, match="one step"):
        calibration_of(steps=1).resample(2)
    assert np.isnan(calibration_of(steps=1).resample(1, timesteps=(5.0,)).errors).all()
    assert np.isnan(calibration.resample(1).errors).all()


def test_steps_past_the_ends_are_as_far_apart_as_they_are() -> None:
    calibration = calibration_of(np.arange(1.0, 4.0)[:, None] / 10, steps=8)  # 1000, 990, ... 930
    carried = calibration.resample(4, timesteps=(1030, 1010, 990, 960))
    np.testing.assert_allclose(carried.errors[0, 0, 0, 1:], [0.2, 0.2, 0.3])


def test_what_a_calibration_keeps_and_what_it_says() -> None:
    calibration = calibration_of(
        solver="DDIMScheduler", peak_bytes=7, tokens=3, provenance={"created": "2026-01-01"}
    )
    carried = calibration.resample(5)
    for name in ("layers", "total_macs", "model", "solver", "peak_bytes", "tokens"):
        assert getattr(carried, name) == getattr(calibration, name)
    assert carried.provenance == {
        "created": "2026-01-01",
        MARK: "from 8 to 5 steps by position in the noise level; not measured",
        "timesteps": "interpolated",
    }
    assert "carried over, not measured" in str(carried).splitlines()[1]
    given_ones = carried.resample(6, timesteps=np.linspace(1000, 930, 6))
    assert "timesteps" not in given_ones.provenance
    assert calibration.provenance == {"created": "2026-01-01"}


def test_a_carried_calibration_survives_its_file(tmp_path: Path) -> None:
    carried = calibration_of(np.linspace(0.1, 0.9, 8)).resample(5)
    carried.save(tmp_path / "c.safetensors")
    loaded = Calibration.load(tmp_path / "c.safetensors")
    np.testing.assert_array_equal(loaded.errors, carried.errors)
    assert loaded.provenance == carried.provenance and loaded.timesteps == carried.timesteps


def shared(switch: int = 4, steps: int = 12, max_gap: int = 2) -> Calibration:
    """One layer runs before the step `switch`, the other from it on."""
    errors = np.full((1, 2, max_gap, steps), np.nan)
    for gap in range(1, max_gap + 1):
        errors[:, 0, gap - 1, gap:switch] = 0.1 * gap
        errors[:, 1, gap - 1, switch + gap :] = 0.2 * gap
    first, second = layers_of(1)
    layers = (replace(first, macs=90), replace(second, macs=30))
    return Calibration(layers, errors, 60, tuple(float(t) for t in range(1200, 0, -100)))


def test_layers_keep_their_part_of_the_generation() -> None:
    carried = shared().resample(24)
    assert carried.steps_run == (range(0, 8), range(8, 24))
    np.testing.assert_allclose(carried.errors[0, 0, 0, 1:8], 0.1 * 11 / 23)
    np.testing.assert_allclose(carried.errors[0, 1, 1, 10:], 0.2 * 22 / 23)
    fewer = shared().resample(6, timesteps=range(1200, 0, -200))
    assert fewer.steps_run == (range(0, 2), range(2, 6)) and fewer.max_gap == 1
    np.testing.assert_allclose(fewer.errors[0, :, 0, 1], [0.2, np.nan])
    np.testing.assert_allclose(fewer.errors[0, 1, 0, 3:], 0.4)


def test_cost_of_a_step_follows_the_layers_that_run() -> None:
    # 90 x 4 + 30 x 8 of 12 x 60 MACs are in the layers: 50 a step, and 10 outside of them.
    carried = shared().resample(9, timesteps=(1200, 1100, 1050, 1000, 950, 900, 800, 600, 400))
    assert carried.steps_run == (range(0, 6), range(6, 9))
    assert carried.total_macs == 10 + (90 * 6 + 30 * 3) // 9
    schedule = plan(carried, alpha=1)
    assert schedule.compute is not None and 0 < schedule.compute < 1
    assert replace(shared(), total_macs=0).resample(24).total_macs == 0


def test_a_part_with_too_few_steps_is_refused() -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        shared(switch=2).resample(7)
    for word in ("'blocks.0.attn'", "1 of the 7", "calibrate with 7 steps"):
        assert word in str(caught.value)


def test_a_plan_for_other_steps_is_that_of_the_carried_curves() -> None:
    calibration = analytic(np.linspace(1000, 20, 50).tolist())
    new = np.linspace(1000, 40, 25)
    schedule = plan(calibration, alpha=0.08, timesteps=new)
    assert schedule == plan(calibration, alpha=0.08, num_steps=25, timesteps=new)
    assert schedule == plan(calibration.resample(25, timesteps=new), alpha=0.08)
    assert schedule.timesteps == tuple(new) and schedule.num_steps == 25
    exact = plan(analytic(new.tolist(), max_gap=2), alpha=0.08)
    assert schedule.rows == exact.rows and not schedule.is_all_compute


def test_a_plan_for_other_steps_says_so(tmp_path: Path) -> None:
    calibration = calibration_of(provenance={"created": "2026-01-01"})
    schedule = plan(calibration, alpha=0.5, num_steps=5)
    schedule.save(tmp_path / "s.json")
    text = "from 8 to 5 steps by position in the noise level; not measured"
    written = json.loads((tmp_path / "s.json").read_text())
    assert written["provenance"][MARK] == text
    assert written["provenance"]["calibration created"] == "2026-01-01"
    assert written["timesteps"] is None  # no solver gave them: a run must not wait for them
    assert "carried over, not measured" in str(Schedule.load(tmp_path / "s.json"))
    assert MARK not in plan(calibration, alpha=0.5, num_steps=8).provenance
    assert plan(calibration, alpha=0.5, num_steps=8) == plan(calibration, alpha=0.5)


@pytest.mark.parametrize(("num_steps", "timesteps", "words"), WRONG[:5] + WRONG[6:])
def test_wrong_steps_of_a_plan(num_steps: Any, timesteps: Any, words: list[str]) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        plan(calibration_of(), alpha=0.1, num_steps=num_steps, timesteps=timesteps)
    assert all(word in str(caught.value) for word in words[:1]), caught.value


def test_a_plan_for_fewer_steps_has_fewer_gaps() -> None:
    calibration = calibration_of(max_gap=4, steps=20)
    with pytest.raises(InvalidArgumentError, match="only gaps up to 2 of 11 steps"):
        plan(calibration, alpha=0.1, max_gap=3, num_steps=11)


def test_what_was_carried_over_runs() -> None:
    pipe = build_pipeline()
    sampler = PipelineSampler(pipe, class_labels=(1,), num_steps=12)
    calibration = calibrate(pipe, sampler, 1, 4, progress=False)
    pipe.scheduler.set_timesteps(6)
    for timesteps in (None, pipe.scheduler.timesteps):
        planned = plan(calibration, alpha=10, num_steps=6, timesteps=timesteps)
        uniform = plan_uniform(calibration, interval=2).resample(6, timesteps=timesteps)
        for schedule in (planned, uniform):
            with cached(pipe, schedule) as run:
                for i in range(2):
                    sampler(i, num_steps=6)
            summary = run.summary()
            assert summary.finished == 2 and not summary.recomputed
            assert summary.reused == 2 * schedule.reused > 0


def smoothcache_plan(*arguments: Any) -> Any:
    from typer.testing import CliRunner

    from smoothcache.cli.app import app

    return CliRunner().invoke(app, ["plan", *map(str, arguments)], prog_name="smoothcache")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    analytic(np.linspace(1000, 20, 50).tolist()).save(tmp_path / "c.safetensors")
    return tmp_path / "c.safetensors"


def test_the_command_plans_for_other_steps(saved: Path) -> None:
    file = saved.with_name("s.json")
    arguments = (saved, "--alpha", 0.08, "-o", file)
    result = smoothcache_plan(*arguments, "--steps", 25)
    assert result.exit_code == 0, result.stderr
    assert "25 steps" in result.stdout and "carried over, not measured" in result.stdout
    assert Schedule.load(file) == plan(Calibration.load(saved), alpha=0.08, num_steps=25)
    document = json.loads(smoothcache_plan(*arguments, "--steps", 25, "--json").stdout)
    assert document["steps"] == 25 and document["carried_over"].startswith("from 50 to 25 steps")
    for options in ((), ("--steps", 50)):
        assert MARK not in smoothcache_plan(*arguments, *options).stdout
    assert json.loads(smoothcache_plan(*arguments, "--json").stdout)["carried_over"] is None


def test_the_command_refuses_in_one_line(saved: Path) -> None:
    file = saved.with_name("s.json")
    for steps, word in ((5, "error curves cover gaps"), (0, "--steps")):
        result = smoothcache_plan(saved, "--alpha", 0.1, "-o", file, "--steps", steps)
        assert result.exit_code == 2 and not file.exists()
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
        assert word in result.stderr
