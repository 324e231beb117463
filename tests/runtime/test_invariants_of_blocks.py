"""The invariants, for blocks and for models."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.block_models import coarse, every_toy, predictors, run_reference, uniform
from support.reference import STEPS, Liveness, remembered, same, sample, times, watched_layers
from support.toys import WIDTH, Toy, build
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import smoothcache as sc


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def toy(toy_name: str) -> Toy:
    return build(toy_name, depth=2)


def assert_agree(schedule: sc.Schedule, got: Any, expected: Any) -> None:
    """Bit for bit, but for the sum of an extrapolation, which may be rounded another way."""
    if all(row.predictor == "hold" for row in schedule.rows.values()):
        assert same(got, expected)
    else:
        torch.testing.assert_close(got, expected)


@every_toy
@coarse
@predictors
def test_1_computing_everything_changes_no_bit(toy: Toy, granularity: str, predictor: str) -> None:
    plain = sample(toy, calls=2)
    with sc.cached(toy, uniform(toy, granularity, 1, predictor)) as run:
        assert same(sample(toy, calls=2), plain)
    assert run.summary().reused == run.summary().peak_bytes == 0


@every_toy
@coarse
@pytest.mark.parametrize(("predictor", "interval", "calls"), [("hold", 2, 2), ("taylor", 3, 1)])
def test_2_a_computed_step_is_that_of_the_model(
    toy: Toy, granularity: str, predictor: str, interval: int, calls: int
) -> None:
    plain = copy.deepcopy(toy)
    schedule = uniform(toy, granularity, interval, predictor)
    with sc.cached(toy, schedule) as run:
        trajectory = sample(toy, calls=calls)
    x = torch.randn(1, 6, WIDTH, generator=torch.Generator().manual_seed(0))
    for step in range(STEPS):
        outputs = [
            plain.denoise(x, torch.tensor([times()[step]]), torch.tensor([branch]))
            for branch in range(calls)
        ]
        after = x - sum(outputs) / (STEPS * calls)
        assert torch.equal(trajectory[step], after) == (step % interval == 0)
        x = trajectory[step]
    assert run.summary().reused == schedule.reused * calls
    assert run.summary().recomputed == {}


@every_toy
@coarse
@pytest.mark.parametrize(
    ("predictor", "interval", "calls"), [("hold", 2, 2), ("hold", 3, 1), ("taylor", 3, 2)]
)
def test_2_the_whole_run_is_what_reuse_by_hand_gives(
    toy: Toy, granularity: str, predictor: str, interval: int, calls: int
) -> None:
    schedule = uniform(toy, granularity, interval, predictor)
    expected, by_hand = run_reference(toy, schedule, calls=calls)
    with sc.cached(toy, schedule) as run:
        got = sample(toy, calls=calls)
    assert_agree(schedule, got, expected)
    assert run.summary().reused == by_hand.reused


@every_toy
@coarse
@pytest.mark.parametrize(("predictor", "interval"), [("hold", STEPS), ("taylor2", 2)])
def test_2_what_does_not_change_is_reused_without_error(
    toy: Toy, granularity: str, predictor: str, interval: int
) -> None:
    """Exactly for a model; the residual of a block is rounded once."""
    toy.condition = lambda t, y: torch.zeros(len(t), WIDTH)  # type: ignore[method-assign]
    x, y = torch.randn(2, 6, WIDTH), torch.tensor([0, 1])
    plain = toy.denoise(x, torch.zeros(2), y)
    with sc.cached(toy, uniform(toy, granularity, interval, predictor)) as run:
        for time in times():
            got = toy.denoise(x, torch.full((2,), time), y)
            if granularity == "model":
                assert torch.equal(got, plain)
            else:
                torch.testing.assert_close(got, plain)
    assert run.summary().reused


def traces(model: nn.Module) -> dict[str, Any]:
    """Class and attributes of every module, and what its containers hold."""
    return {
        path: (
            type(module),
            {
                name: list(value.items()) if isinstance(value, dict) else value
                for name, value in vars(module).items()
            },
        )
        for path, module in model.named_modules()
    }


class Stop(Exception):
    pass


@every_toy
@coarse
@pytest.mark.parametrize("how", ["to its end", "broken off"])
def test_3_removal_leaves_everything_as_it_was(toy: Toy, granularity: str, how: str) -> None:
    for module in toy.modules():
        module.register_forward_hook(lambda *_: None)
        module.register_forward_pre_hook(lambda *_: None)
    before, keys, plain = traces(toy), list(toy.state_dict()), sample(toy)

    def stop(step: int) -> None:
        if how == "broken off" and step == 4:
            raise Stop

    try:
        with sc.cached(toy, uniform(toy, granularity)):
            assert list(toy.state_dict()) == keys
            assert all(isinstance(m, before[path][0]) for path, m in toy.named_modules())
            sample(toy, after=stop)
    except Stop:
        pass
    assert traces(toy) == before
    assert same(sample(toy), plain)


@every_toy
@coarse
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_3_a_copy_is_a_plain_model_of_its_own(
    toy: Toy, granularity: str, copied: Callable[[Toy], Toy]
) -> None:
    plain, classes = sample(toy), [type(module) for module in toy.modules()]
    schedule = uniform(toy, granularity)
    with sc.cached(toy, schedule):
        under_schedule = sample(toy)
        twin = copied(toy)
        assert [type(module) for module in twin.modules()] == classes
        assert same(sample(twin), plain)
        with sc.cached(twin, schedule):
            assert same(sample(twin), under_schedule)
        for parameter in twin.parameters():
            parameter.mul_(0.5)
        assert same(sample(toy), under_schedule)
    assert same(sample(toy), plain)


@every_toy
@coarse
@pytest.mark.parametrize("other", [{"seed": 5}, {"batch": 3, "tokens": 9}, {"calls": 2}], ids=str)
def test_4_two_generations_equal_two_fresh_ones(
    toy: Toy, granularity: str, other: dict[str, int]
) -> None:
    schedule = uniform(toy, granularity, 3, "taylor")
    fresh = []
    for options in ({}, other):
        with sc.cached(toy, schedule):
            fresh.append(sample(toy, **options))  # type: ignore[arg-type]
    with sc.cached(toy, schedule) as run:
        together = [sample(toy), sample(toy, **other), sample(toy)]  # type: ignore[arg-type]
    assert same(together, [*fresh, fresh[0]])
    assert (run.summary().finished, run.summary().broken_off) == (3, 0)
    assert run.summary().recomputed == {}


@every_toy
@coarse
@pytest.mark.parametrize("after_steps", [2, 5])
@pytest.mark.parametrize("raises", [False, True])
def test_4_a_generation_broken_off_is_forgotten(
    toy: Toy, granularity: str, after_steps: int, raises: bool
) -> None:
    schedule = uniform(toy, granularity, 3)
    with sc.cached(toy, schedule):
        fresh = sample(toy, seed=1)

    def stop(step: int) -> None:
        if raises and step == after_steps - 1:
            raise Stop

    with sc.cached(toy, schedule) as run:
        try:
            sample(toy, timesteps=times()[:after_steps], after=stop)
        except Stop:
            pass
        assert same(sample(toy, seed=1), fresh)
    assert (run.summary().finished, run.summary().broken_off) == (1, 1)
    assert run.summary().recomputed == {}


@every_toy
@coarse
@pytest.mark.parametrize("num_steps", [STEPS - 1, STEPS + 1])
def test_4_another_number_of_steps_is_refused(toy: Toy, granularity: str, num_steps: int) -> None:
    before = traces(toy)
    with (
        pytest.raises(sc.ScheduleMismatchError, match=r"\b(7 steps|step 9)\b.*\b8\b.*plan"),
        sc.cached(toy, uniform(toy, granularity)),
    ):
        sample(toy, num_steps)
    assert traces(toy) == before


@every_toy
@coarse
@pytest.mark.parametrize(("predictor", "interval"), [("hold", 3), ("taylor", 2), ("taylor2", 3)])
def test_5_values_are_held_until_their_last_use(
    toy: Toy, granularity: str, predictor: str, interval: int
) -> None:
    schedule = uniform(toy, granularity, interval, predictor)
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
    assert held == expected.after_step and held[-1] == 0
    assert run.summary().peak_bytes == expected.peak > 0


@pytest.mark.parametrize("toy_name", ["single", "dual", "in-place"])
@coarse
@predictors
def test_5_the_bytes_reported_are_the_tensors_alive(
    toy: Toy, granularity: str, predictor: str
) -> None:
    mine: list[Tensor] = []
    gaps: list[int] = []

    def alive() -> dict[int, Tensor]:
        return {id(x): x for x in gc.get_objects() if type(x) is Tensor}

    gc.collect()
    gc.freeze()
    try:
        with sc.cached(toy, uniform(toy, granularity, 3, predictor)) as run:
            before = set(alive())
            for time in times():
                x, t, y = torch.zeros(1, 6, WIDTH), torch.tensor([time]), torch.tensor([0])
                mine.extend((x, t, y, toy.denoise(x, t, y)))
                others = {id(x) for x in mine} | before | remembered(run)
                kept = sum(x.nbytes for i, x in alive().items() if i not in others)
                gaps.append(kept - run.summary().held_bytes)
    finally:
        gc.unfreeze()
    assert gaps == [0] * STEPS


class NoReading(TorchDispatchMode):
    """Refuses every operator that hands a value on the device to the host."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero"), name
        return func(*args, **(kwargs or {}))


@every_toy
@coarse
def test_7_nothing_is_read_while_sampling(toy: Toy, granularity: str) -> None:
    with sc.cached(toy, uniform(toy, granularity, 3, "taylor")), NoReading():
        sample(toy, calls=2)
