"""The seven invariants of the design, over planners, predictors, granularities and toys.

What depends on all four runs in their full product. The rest runs in cases in which every two
values meet.
"""

from __future__ import annotations

import copy
import gc
import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from support.pairwise import pairwise
from support.reference import (
    STEPS,
    ByHand,
    Liveness,
    levels,
    remembered,
    run_by_hand,
    same,
    sample,
    times,
    watched_layers,
)
from support.toys import TOYS, WIDTH, Toy, build
from support.traces import assert_same_traces, traces
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import smoothcache as sc
from smoothcache.planners import PLANNERS, plan_uniform


def without_timesteps(calibration: sc.Calibration, **options: Any) -> sc.Schedule:
    """As ``Schedule.uniform`` plans of the model alone: nobody says where a generation begins."""
    return replace(plan_uniform(calibration, **options), timesteps=None)


WAYS: dict[str, Callable[[sc.Calibration], sc.Schedule]] = {
    **PLANNERS,
    "uniform-3": partial(without_timesteps, interval=3),
    "uniform-2-taylor": partial(without_timesteps, interval=2, predictor="taylor"),
    "uniform-3-taylor2": partial(plan_uniform, interval=3, predictor="taylor2"),
}
GRANULARITIES = ("auto", "block", "model")


@cache
def calibration_of(name: str, granularity: Any) -> sc.Calibration:
    toy = build(name, depth=2)
    return sc.calibrate(
        toy,
        lambda i: toy.generate(STEPS, seed=i),
        num_samples=2,
        max_gap=3,
        granularity=granularity,
        progress=False,
    )


@cache
def schedule_of(planner: str, name: str, granularity: str) -> sc.Schedule:
    return WAYS[planner](calibration_of(name, granularity))


def computes_everything(schedule: sc.Schedule) -> list[bool]:
    return [bool(everything) for everything in schedule.table().all(axis=0)]


def assert_agree(schedule: sc.Schedule, got: Any, expected: Any) -> None:
    """Bit for bit, but for the sum of an extrapolation, which may be rounded another way."""
    if all(row.predictor == "hold" for row in schedule.rows.values()):
        assert same(got, expected)
    else:
        torch.testing.assert_close(got, expected)


every_toy = pytest.mark.parametrize("toy_name", TOYS)
every_planner = pytest.mark.parametrize("planner", WAYS)
every_granularity = pytest.mark.parametrize("granularity", GRANULARITIES)


def schedules(names: str = "", *axes: Any) -> pytest.MarkDecorator:
    """Toys, planners, granularities and what else a test is about, every two of them together."""
    arguments = ",".join(filter(None, ["planner, toy_name, granularity", names]))
    return pairwise(arguments, WAYS, TOYS, GRANULARITIES, *axes)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def toy(toy_name: str) -> Toy:
    return build(toy_name, depth=2)


@pytest.fixture
def schedule(planner: str, toy_name: str, granularity: str) -> sc.Schedule:
    return schedule_of(planner, toy_name, granularity)


@every_granularity
def test_the_planners_and_toys_reuse_something(granularity: str) -> None:
    reusing = {
        planner
        for planner in WAYS
        for name in TOYS
        if schedule_of(planner, name, granularity).reused
    }
    assert reusing == set(WAYS) - {"everything"}


@pairwise("toy_name, predictor, granularity, calls", TOYS, sc.PREDICTORS, GRANULARITIES, (1, 2))
def test_1_a_schedule_that_computes_everything_changes_no_bit(
    toy: Toy, predictor: str, granularity: Any, calls: int
) -> None:
    plain = sample(toy, calls=calls)
    everything = sc.Schedule.uniform(
        toy, STEPS, 1, predictor=predictor, granularity=granularity, noise_levels=levels()
    )
    with sc.cached(toy, everything) as run:
        under_schedule = sample(toy, calls=calls)
    assert same(plain, under_schedule)
    assert run.summary().reused == 0
    assert run.summary().peak_bytes == 0


@schedules("calls", (1, 2))
def test_2_a_computed_step_is_that_of_the_model(
    toy: Toy, schedule: sc.Schedule, calls: int
) -> None:
    """Step by step: both models start from the same latents."""
    plain = copy.deepcopy(toy)
    with sc.cached(toy, schedule) as run:
        trajectory = sample(toy, calls=calls)
    x = torch.randn(1, 6, WIDTH, generator=torch.Generator().manual_seed(0))
    for step, everything in enumerate(computes_everything(schedule)):
        outputs = [
            plain.denoise(x, torch.tensor([times()[step]]), torch.tensor([branch]))
            for branch in range(calls)
        ]
        after = x - sum(outputs) / (STEPS * calls)
        assert torch.equal(trajectory[step], after) == everything
        x = trajectory[step]
    assert run.summary().reused == schedule.reused * calls * uses_per_layer(toy, schedule)
    assert run.summary().recomputed == {}


def uses_per_layer(toy: Toy, schedule: sc.Schedule) -> float:
    """Calls of the layers that reuse, for each of their entries in the schedule."""
    if not schedule.reused:
        return 0
    with watched_layers(toy, schedule) as seen:
        toy.generate(1)
    uses = {path: [p for p, _ in seen].count(path) for path in schedule.rows}
    calls = sum(uses[path] * row.computed.count(False) for path, row in schedule.rows.items())
    return calls / schedule.reused


@every_toy
@every_planner
@every_granularity
def test_2_the_whole_run_is_what_reuse_by_hand_gives(
    toy: Toy, planner: str, granularity: str, schedule: sc.Schedule
) -> None:
    calls = 1 + len(planner + granularity) % 2
    expected, by_hand = run_by_hand(toy, schedule, calls=calls)
    with sc.cached(toy, schedule) as run:
        got = sample(toy, calls=calls)
    assert_agree(schedule, got, expected)
    assert run.summary().reused == by_hand.reused
    assert by_hand.recomputed == 0


@pairwise(
    "toy_name, predictor, granularity, interval",
    TOYS,
    sc.PREDICTORS,
    GRANULARITIES,
    (2, 3, STEPS),
)
def test_2_what_does_not_change_is_reused_without_error(
    toy: Toy, predictor: str, granularity: Any, interval: int
) -> None:
    """The same input at every step, to a model that ignores the time.

    Exactly for layers and models; the residual of a block is rounded once.
    """
    toy.condition = lambda t, y: torch.zeros(len(t), WIDTH)  # type: ignore[method-assign]
    x, y = torch.randn(2, 6, WIDTH), torch.tensor([0, 1])
    plain = toy.denoise(x, torch.zeros(2), y)
    schedule = sc.Schedule.uniform(
        toy, STEPS, interval, predictor=predictor, granularity=granularity, noise_levels=levels()
    )
    has_blocks = any(layer.kind == "block" for layer in schedule.layers or ())
    with sc.cached(toy, schedule) as run:
        for time in times():
            got = toy.denoise(x, torch.full((2,), time), y)
            if has_blocks:
                torch.testing.assert_close(got, plain)
            else:
                assert torch.equal(got, plain)
    assert run.summary().reused


@schedules()
def test_3_removal_leaves_everything_as_it_was(toy: Toy, schedule: sc.Schedule) -> None:
    for module in toy.modules():
        module.register_forward_hook(lambda *_: None)
        module.register_forward_pre_hook(lambda *_: None)
    before, keys = traces(toy), list(toy.state_dict())
    classes = {path: type(module) for path, module in toy.named_modules()}
    plain = sample(toy)
    with sc.cached(toy, schedule):
        sample(toy)
        assert list(toy.state_dict()) == keys
        for path, module in toy.named_modules():
            assert isinstance(module, classes[path])
            assert type(module).__name__ == classes[path].__name__
            assert type(module).__module__ == classes[path].__module__
    assert_same_traces(before, traces(toy))
    assert same(sample(toy), plain)


class Stop(Exception):
    pass


@pairwise(
    "toy_name, where, granularity",
    TOYS,
    ("in a layer", "in the sampler", "before any call"),
    GRANULARITIES,
)
def test_3_removal_after_an_exception(
    toy: Toy, toy_name: str, where: str, granularity: str
) -> None:
    schedule = schedule_of("uniform-2", toy_name, granularity)
    before, plain = traces(toy), sample(toy)

    def fail(step: int) -> None:
        if step == 3:
            raise Stop

    with pytest.raises(Stop), sc.cached(toy, schedule):
        if where == "before any call":
            raise Stop
        if where == "in the sampler":
            sample(toy, after=fail)
        break_at(toy, times()[0])
    heal(toy)
    assert_same_traces(before, traces(toy))
    assert same(sample(toy), plain)


@schedules("how", ("deepcopy", "pickle", "torch.save"))
def test_3_a_copy_is_independent(toy: Toy, schedule: sc.Schedule, how: str) -> None:
    plain, plain_classes = sample(toy), [type(module) for module in toy.modules()]
    with sc.cached(toy, schedule):
        under_schedule = sample(toy)
    with sc.cached(toy, schedule):
        x = sample(toy, after=lambda step: None)
        twin = copies[how](toy)
        assert [type(m) for m in twin.modules()] == plain_classes
        assert same(sample(twin), plain)  # the copy is the plain model
        with sc.cached(twin, schedule):
            assert same(sample(twin), under_schedule)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.mul_(0.5)
        assert same(sample(toy), under_schedule)
        assert same(x, under_schedule)
        changed = sample(twin)
        assert not same(changed, plain)
    assert same(sample(toy), plain)
    for parameter in toy.parameters():
        parameter.zero_()
    assert same(sample(twin), changed)


def unpickled(model: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(model))


def loaded(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


copies: dict[str, Callable[[nn.Module], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": unpickled,
    "torch.save": loaded,
}


@schedules(
    "other",
    [{"seed": 5}, {"batch": 3}, {"tokens": 9}, {"calls": 2}, {"seed": 5, "batch": 2, "tokens": 4}],
)
def test_4_two_generations_equal_two_fresh_ones(
    toy: Toy, schedule: sc.Schedule, other: dict[str, int]
) -> None:
    fresh = []
    for options in ({}, other):
        with sc.cached(toy, schedule):
            fresh.append(sample(toy, **options))  # type: ignore[arg-type]
    with sc.cached(toy, schedule) as run:
        together = [sample(toy), sample(toy, **other), sample(toy)]  # type: ignore[arg-type]
    assert same(together, [*fresh, fresh[0]])
    assert (run.summary().finished, run.summary().broken_off) == (3, 0)
    assert not run.summary().recomputed


@every_toy
@every_granularity
def test_4_more_steps_are_refused_at_the_call(toy: Toy, toy_name: str, granularity: str) -> None:
    schedule = schedule_of("uniform-2", toy_name, granularity)
    before = traces(toy)
    with (
        pytest.raises(sc.ScheduleMismatchError, match=r"step 9\b.*\b8\b.*plan"),
        sc.cached(toy, schedule),
    ):
        sample(toy, STEPS + 1)
    assert_same_traces(before, traces(toy))


@every_toy
@every_granularity
def test_4_fewer_steps_are_refused_at_the_end(toy: Toy, toy_name: str, granularity: str) -> None:
    schedule = schedule_of("uniform-2", toy_name, granularity)
    before = traces(toy)
    with (
        pytest.raises(sc.ScheduleMismatchError, match=r"after 7 steps.*\b8\b"),
        sc.cached(toy, schedule),
    ):
        sample(toy, STEPS - 1)
    assert_same_traces(before, traces(toy))
    handle = sc.enable(toy, schedule)
    sample(toy, STEPS - 1)
    with pytest.warns(sc.SmoothCacheWarning, match=r"after 7 steps"):
        handle.disable()
    assert_same_traces(before, traces(toy))


@schedules("how, after_steps", ("in a layer", "outside", "stopped"), (2, 5))
def test_4_a_generation_broken_off_is_forgotten(
    toy: Toy, schedule: sc.Schedule, how: str, after_steps: int
) -> None:
    with sc.cached(toy, schedule):
        fresh = sample(toy, seed=1)
    with sc.cached(toy, schedule) as run:
        break_off(toy, how, after_steps)
        again = sample(toy, seed=1)
    assert same(again, fresh)
    assert (run.summary().finished, run.summary().broken_off) == (1, 1)


@schedules(
    "how_and_calls",
    [("in a layer", 1), ("stopped", 1), ("outside", 2), ("between the calls", 2)],
)
def test_4_even_after_its_first_step(
    toy: Toy, schedule: sc.Schedule, how_and_calls: tuple[str, int]
) -> None:
    """Where that cannot be told from guidance in several calls, step 1 is computed."""
    how, calls = how_and_calls
    with sc.cached(toy, schedule):
        fresh = sample(toy, seed=1, calls=calls)
    cautious = {
        path: sc.Row((True, True, *row.computed[2:]), row.predictor)
        for path, row in schedule.rows.items()
    }
    by_hand = ByHand(toy, sc.Schedule(STEPS, cautious, schedule.layers))

    def forgetting(step: int, branch: int) -> None:
        if (step, branch) == (1, 0):
            by_hand.outputs.clear()
        by_hand.begin(step, branch)

    careful = sample(by_hand.toy, seed=1, calls=calls, begin=forgetting)
    with sc.cached(toy, schedule):
        break_off(toy, how, 1, calls=calls)
        again = sample(toy, seed=1, calls=calls)
    if not same(again, fresh):
        torch.testing.assert_close(again, careful)


@schedules()
def test_4_a_call_that_failed_is_forgotten(toy: Toy, schedule: sc.Schedule) -> None:
    """Even the very first one, which the next generation's first call looks like."""
    with sc.cached(toy, schedule):
        fresh = sample(toy, seed=1)
    with sc.cached(toy, schedule) as run:
        with pytest.raises(Stop):
            break_at(toy, times()[0])
        heal(toy)
        assert run.summary().held_bytes == 0
        assert same(sample(toy, seed=1), fresh)
    assert (run.summary().finished, run.summary().broken_off) == (1, 1)
    assert not run.summary().recomputed


@every_toy
@every_granularity
def test_4_reset_forgets_the_generation_under_way(
    toy: Toy, toy_name: str, granularity: str
) -> None:
    schedule = schedule_of("uniform-2", toy_name, granularity)
    with sc.cached(toy, schedule):
        fresh = sample(toy, seed=1)
    with sc.cached(toy, schedule) as run:
        for after_steps in (1, 3):
            break_off(toy, "stopped", after_steps)
            run.reset()
            assert run.summary().held_bytes == 0
            assert same(sample(toy, seed=1), fresh)
    assert (run.summary().finished, run.summary().broken_off) == (2, 2)


def break_off(toy: Toy, how: str, after_steps: int, calls: int = 1) -> None:
    """Begins a generation and does not finish it."""

    def fail(step: int) -> None:
        if step == after_steps - 1:
            raise Stop

    def fail_between(step: int, branch: int) -> None:
        if (step, branch) in ((after_steps - 1, 1), (after_steps, 0)):
            raise Stop

    if how == "stopped":
        sample(toy, timesteps=times()[:after_steps], calls=calls)
        return
    if how == "in a layer":
        sample(toy, timesteps=times()[:after_steps], calls=calls)
        with suppress(Stop):  # where the whole model is reused, its head does not run
            break_at(toy, times()[after_steps])
        heal(toy)
        return
    with pytest.raises(Stop):
        if how == "outside":
            sample(toy, after=fail, calls=calls)
        else:
            sample(toy, begin=fail_between, calls=calls)


def break_at(toy: Toy, time: float) -> None:
    """One call of the model at a time, in which the head fails, after all layers have run."""

    def fail(*_: Any) -> None:
        raise Stop

    toy.head.register_forward_pre_hook(fail)
    toy.denoise(torch.zeros(1, 6, WIDTH), torch.tensor([time]), torch.tensor([0]))


def heal(toy: Toy) -> None:
    toy.head._forward_pre_hooks.clear()


@every_toy
@every_planner
@every_granularity
def test_5_values_are_held_until_their_last_use(toy: Toy, schedule: sc.Schedule) -> None:
    per_step: list[list[tuple[str, int]]] = []
    with watched_layers(toy, schedule) as seen:

        def end_step(step: int) -> None:
            per_step.append(list(seen))
            seen.clear()

        sample(toy, after=end_step)
    expected = Liveness(per_step, schedule)
    held: list[int] = []
    with sc.cached(toy, schedule) as run:
        sample(toy, after=lambda step: held.append(run.summary().held_bytes))
    assert run.summary().peak_bytes == expected.peak
    # What is of no use in the next step may stay until that one begins.
    assert held == expected.after_step
    assert held[-1] == 0


@schedules("calls", (1, 2))
def test_5_the_bytes_reported_are_the_tensors_alive(
    toy: Toy, schedule: sc.Schedule, calls: int
) -> None:
    def tensors() -> dict[int, Tensor]:
        return {id(x): x for x in gc.get_objects() if type(x) is Tensor}

    gaps: list[int] = []

    def compare(step: int) -> None:
        owned = {id(x) for x in mine} | remembered(run)
        new = [x for i, x in tensors().items() if i not in before and i not in owned]
        gaps.append(sum(x.nbytes for x in new) - run.summary().held_bytes)

    def step_by_step() -> None:
        x = torch.zeros(1, 6, WIDTH)
        for step, time in enumerate(times()):
            t = torch.tensor([time])
            for branch in range(calls):
                y = torch.tensor([branch])
                out = toy.denoise(x, t, y)
                mine.extend((x, t, y, out))  # alive, so that nothing else gets their identity
            compare(step)

    mine: list[Tensor] = []
    gc.freeze()  # so that only what comes from now on is looked through
    try:
        with sc.cached(toy, schedule) as run:
            before = tensors()
            step_by_step()
            assert run.summary().held_bytes == 0
    finally:
        gc.unfreeze()
    assert gaps == [0] * STEPS


Attempt = Callable[[Toy, sc.Schedule], object]
WRONG: dict[str, tuple[Attempt, type[Exception], str]] = {
    "a path": (
        lambda toy, schedule: sc.enable(toy, "dit.json"),  # type: ignore[arg-type]
        sc.InvalidArgumentError,
        r"Schedule, got str.*load",
    ),
    "no schedule": (
        lambda toy, schedule: sc.enable(toy, None),  # type: ignore[arg-type]
        sc.InvalidArgumentError,
        r"Schedule, got NoneType",
    ),
    "no model": (
        lambda toy, schedule: sc.enable("dit", schedule),
        sc.InvalidArgumentError,
        r"pipeline or a torch.nn.Module, got str",
    ),
    "a model without layers": (
        lambda toy, schedule: sc.enable(nn.Linear(2, 2), schedule),
        sc.ScheduleMismatchError,
        r"planned for \w+Toy|planned for Toy.*but the model is Linear",
    ),
    "the schedule of another model": (
        lambda toy, schedule: sc.enable(toy, sc.Schedule.uniform(type(toy)(depth=1), STEPS, 2)),
        sc.ScheduleMismatchError,
        r"planned for.*but the model is.*plan",
    ),
    "the schedule of a narrower model": (
        lambda toy, schedule: sc.enable(type(toy)(depth=2, dim=32), schedule),
        sc.ScheduleMismatchError,
        r"planned for.*but the model is.*plan",
    ),
    "layers that the model lacks": (
        lambda toy, schedule: sc.enable(toy, renamed(schedule)),
        sc.ScheduleMismatchError,
        r"missing from the model: 'blocks\.7",
    ),
    "a published name that fits nothing": (
        lambda toy, schedule: sc.enable(toy, sc.Schedule(2, {"attn9": sc.Row((True, False))})),
        sc.ScheduleMismatchError,
        r"'attn9' fits no layer",
    ),
}


def renamed(schedule: sc.Schedule) -> sc.Schedule:
    """A schedule for block 7 instead of 0, of a model that is not known."""
    names = {path: path.replace("blocks.0", "blocks.7") for path in schedule.rows}
    return sc.Schedule(
        STEPS,
        {names[path]: row for path, row in schedule.rows.items()},
        tuple(replace(x, path=names[x.path]) for x in schedule.layers or ()),
    )


@every_toy
@pytest.mark.parametrize("what", WRONG)
def test_6_wrong_input_is_refused_before_anything_is_altered(
    toy: Toy, toy_name: str, what: str
) -> None:
    attempt, error, words = WRONG[what]
    before = traces(toy)
    with pytest.raises(error, match=words):
        attempt(toy, schedule_of("uniform-2", toy_name, "auto"))
    assert_same_traces(before, traces(toy))


@every_toy
@every_granularity
def test_6_a_model_in_use_is_refused(toy: Toy, toy_name: str, granularity: str) -> None:
    schedule = schedule_of("uniform-2", toy_name, granularity)
    before = traces(toy)
    with sc.cached(toy, schedule):
        meanwhile = traces(toy)
        attempts: list[Callable[[], Any]] = [
            lambda: sc.enable(toy, schedule),
            lambda: sc.calibrate(toy, lambda i: None, progress=False),
        ]
        if granularity != "model":  # which leaves what is inside the model alone
            part = toy.blocks[0]
            attempts.append(lambda: sc.enable(part, sc.Schedule.uniform(part, STEPS, 2)))
        for attempt in attempts:
            with pytest.raises(sc.AlreadyCachedError, match="disable"):
                attempt()
            assert_same_traces(meanwhile, traces(toy))
        under_schedule = sample(toy)
    assert_same_traces(before, traces(toy))
    with sc.cached(toy, schedule):
        assert same(sample(toy), under_schedule)


@every_toy
def test_6_disabling_twice_is_refused(toy: Toy, toy_name: str) -> None:
    handle = sc.enable(toy, schedule_of("uniform-2", toy_name, "auto"))
    handle.disable()
    before = traces(toy)
    with pytest.raises(sc.SmoothCacheError, match="disabled"):
        handle.disable()
    assert_same_traces(before, traces(toy))


class NoReading(TorchDispatchMode):
    """Refuses every operator that hands a value on the device to the host."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero"), name
        return func(*args, **(kwargs or {}))


@schedules()
def test_7_nothing_is_read_or_printed_while_sampling(
    toy: Toy, schedule: sc.Schedule, capfd: pytest.CaptureFixture[str]
) -> None:
    with sc.cached(toy, schedule), NoReading():
        sample(toy, calls=2)
    assert capfd.readouterr() == ("", "")


@schedules()
def test_7_the_schedule_alone_decides(toy: Toy, schedule: sc.Schedule) -> None:
    """Also with weights and inputs that are no numbers."""
    counts = set()
    for factor in (1.0, 0.0, float("nan")):
        for parameter in toy.parameters():
            parameter.mul_(factor)
        with sc.cached(toy, schedule) as run:
            sample(toy)
        counts.add((run.summary().computed, run.summary().reused))
        assert not run.summary().recomputed
    assert len(counts) == 1
