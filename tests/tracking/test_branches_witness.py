"""Whose value was reused."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from support.generations import (
    PROMPTS,
    SOLVERS,
    ByHand,
    Witness,
    WitnessPipe,
    dit_pipe,
    noise,
    witness_schedule,
)
from torch import Tensor, nn

import smoothcache as sc

diffusers = pytest.importorskip("diffusers")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::smoothcache.errors.SmoothCacheWarning"),
]


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


Condition = Callable[[str, int], Any]
CONDITIONS: dict[str, Condition] = {
    "same objects": lambda branch, step: PROMPTS[branch],
    "made anew": lambda branch, step: PROMPTS[branch].clone(),
    "labels": lambda branch, step: torch.tensor([ord(branch)]),
    "numbers": lambda branch, step: ord(branch),
    "beside what is shared": lambda branch, step: [PROMPTS["p"], PROMPTS[branch].clone()],
    "in a mapping, or missing": lambda branch, step: {"y": PROMPTS["c"] if branch == "c" else None},
    "beside what varies": lambda branch, step: [
        noise(2, seed=1000 * step + ord(branch)),
        PROMPTS[branch],
    ],
}


def guided(
    model: Witness,
    pattern: Sequence[str],
    condition: Condition,
    *,
    generation: int = 0,
    named: bool = False,
    made_anew: bool = False,
) -> None:
    """A sampling loop of the user's own; the pattern spells the branches of each step in order."""
    for step, branches in enumerate(pattern):
        x, t = torch.randn(1, 2, 2), torch.tensor([1000 * (1 - step / len(pattern))])
        for branch in branches:
            with model.cache_context(branch) if named else nullcontext():
                given = x.clone() if made_anew else x
                model.tell(generation, branch, step, given, t, condition(branch, step))


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("interval", [2, 5])
def test_every_order_of_two_calls(condition: str, interval: int) -> None:
    """All ways in which a step calls for one prompt, for the other, or for both in either order."""
    schedule = witness_schedule(5, interval)
    patterns = list(itertools.product(("c", "u", "uc", "cu"), repeat=5))
    for pattern in patterns[:: 2 if condition == "made anew" else 7]:
        model = Witness()
        with sc.cached(model, schedule) as run:
            guided(model, pattern, CONDITIONS[condition])
        model.assert_right(run)


@pytest.mark.parametrize("interval", [2, 3])
def test_every_order_of_two_named_calls(interval: int) -> None:
    """Names settle it, also where the conditioning is the same, or another in every step."""
    schedule = witness_schedule(5, interval)
    for number, pattern in enumerate(itertools.product(("c", "u", "uc", "cu"), repeat=5)):
        if number % 7 == 0:
            model = Witness()
            with sc.cached(model, schedule) as run:
                guided(model, pattern, lambda branch, step: PROMPTS["p"] + step % 2, named=True)
            model.assert_right(run)


PATTERNS = {
    "in every step": ("uc",) * 6,
    "begins later": ("c", "c", "uc", "uc", "uc", "uc"),
    "begins later, the other first": ("c", "c", "cu", "cu", "cu", "cu"),
    "ends early, the first goes on": ("cu", "cu", "cu", "c", "c", "c"),
    "ends early, the second goes on": ("uc", "uc", "uc", "c", "c", "c"),
    "pauses": ("uc", "uc", "c", "c", "uc", "uc"),
    "every other step": ("uc", "c", "uc", "c", "uc", "c"),
    "turns about": ("uc", "cu", "uc", "cu", "uc", "cu"),
    "three calls in the middle": ("uc", "uc", "upc", "upc", "uc", "uc"),
    "one of each in turn": ("u", "c", "u", "c", "u", "c"),
}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("predictor", ["hold", "taylor"])
def test_guidance_in_some_steps_recomputes_only_what_is_missing(
    pattern: str, predictor: str
) -> None:
    """A real transformer against the reference, which is told the branches."""
    model = dit_pipe().transformer
    schedule = sc.Schedule.uniform(model, 6, 3)
    labels = {branch: torch.tensor([label]) for label, branch in enumerate("cup")}

    def generate(model: nn.Module, begin: Callable[[int, str], None]) -> list[Tensor]:
        x, outputs = noise(1, 4, 4, 4), []
        for step, branches in enumerate(PATTERNS[pattern]):
            for branch in branches:
                begin(step, branch)
                t = torch.tensor([1000 - 150 * step])
                outputs.append(model(x, timestep=t, class_labels=labels[branch].clone()).sample)
            x = x - 0.1 * outputs[-1]
        return outputs

    by_hand = ByHand(model, schedule)
    expected = generate(by_hand.model, by_hand.begin)
    if predictor == "taylor":  # where every branch has one value to go by, it is held
        rows = {path: sc.Row(row.computed, "taylor") for path, row in schedule.rows.items()}
        schedule = sc.Schedule(6, rows, schedule.layers)
    with sc.cached(model, schedule) as run:
        got = generate(model, lambda step, branch: None)
    first_steps = sum(map(len, PATTERNS[pattern][: 3 if predictor == "taylor" else 6]))
    for a, b in zip(got[:first_steps], expected[:first_steps], strict=True):
        assert torch.equal(a, b)
    assert run.summary().reused == by_hand.reused
    assert sum(run.summary().recomputed.values()) == by_hand.recomputed


@pytest.mark.parametrize("batches", [(2, 2, 1, 1, 2, 2), (1, 1, 2, 2, 2, 2), (2, 1, 2, 1, 2, 1)])
@pytest.mark.parametrize("told", [True, False])
def test_a_batch_that_changes_in_mid_run(batches: tuple[int, ...], told: bool) -> None:
    """Both prompts in one call in some steps, one of them alone in others."""
    schedule, model = witness_schedule(6, 3), Witness()
    prompts = torch.cat([PROMPTS["u"], PROMPTS["c"]])
    with sc.cached(model, schedule) as run:
        for step, batch in enumerate(batches):
            x, t = torch.randn(batch, 2, 2), torch.full((batch,), 900.0 - 100 * step)
            condition = prompts[2 - batch :].clone() if told else None
            model.tell(0, batch, step, x, t, condition)
    model.assert_right(run)
    assert sum(run.summary().recomputed.values()) > 0


SOME_STEPS = {
    "ends early": ("uc", "uc", "uc", "uc", "c", "c"),
    "begins later": ("c", "c", "c", "uc", "uc", "uc"),
    "pauses": ("uc", "uc", "c", "uc", "uc", "uc"),
    "turns about": ("uc", "uc", "uc", "cu", "uc", "uc"),
}


@pytest.mark.parametrize("pattern", SOME_STEPS)
def test_prompts_that_differ_in_every_step(pattern: str) -> None:
    """Noise on the conditioning (CADS), or a fade between two prompts, with guidance in between."""
    schedule, model = witness_schedule(6, 6), Witness()
    with sc.cached(model, schedule):
        guided(model, SOME_STEPS[pattern], lambda branch, step: PROMPTS[branch] + step)
    assert model.foreign() == []


@pytest.mark.parametrize("pattern", [x for x in SOME_STEPS if x != "begins later"])
@pytest.mark.parametrize("made_anew", [False, True])
def test_branches_that_are_conditioned_alike_are_computed(pattern: str, made_anew: bool) -> None:
    """Guidance by a perturbed model: the calls differ in nothing that the model is given."""
    schedule, model = witness_schedule(6, 6), Witness()
    with sc.cached(model, schedule) as run:
        guided(model, SOME_STEPS[pattern], lambda branch, step: PROMPTS["p"], made_anew=made_anew)
    model.assert_right(run)
    calls = sum(map(len, SOME_STEPS[pattern]))
    assert run.summary().recomputed == {"the calls of a step could not be told apart": calls - 2}


@pytest.mark.parametrize("handle", ["pipeline", "module"])
@pytest.mark.parametrize("step", range(1, 4))
def test_branches_that_turn_out_to_be_alike_after_a_reuse_are_refused(
    step: int, handle: str
) -> None:
    """The first of the two has been taken for the second, and nothing could have told."""
    pipe = WitnessPipe(SOLVERS["ddim"]())
    pipe.scheduler.set_timesteps(6)
    words = rf"in step {step} the model was called twice with the same latents.*cache_context"
    with sc.cached(pipe if handle == "pipeline" else pipe.transformer, witness_schedule(6, 3)):
        with pytest.raises(sc.ScheduleMismatchError, match=words) if step < 3 else nullcontext():
            for i, t in enumerate(pipe.scheduler.timesteps):
                x = torch.randn(1, 2, 2)
                for branch in "pc" if i >= step else "c":
                    pipe.transformer.tell(0, branch, i, x, t.reshape(1), PROMPTS["p"])
    foreign = pipe.transformer.foreign()
    assert foreign == ([((0, "p", step), (0, "c", 0))] if step < 3 else [])


def test_stages_of_a_solver_of_ones_own_are_taken_in_their_order() -> None:
    """Heun without a noise scheduler: the latents differ between the calls of a step."""
    schedule, model = witness_schedule(6, 3), Witness()
    with sc.cached(model, schedule) as run:
        for generation in range(2):
            for step in range(6):
                for stage in range(1 if step == 5 else 2):
                    x, t = torch.randn(1, 2, 2), torch.tensor([1000.0 - 100 * step])
                    model.tell(generation, stage, step, x, t, PROMPTS["c"])
    model.assert_right(run)
    assert run.summary().recomputed == {"it could have been another generation's value": 4}


def test_windows_of_which_the_first_was_left_out_are_computed_from_then_on() -> None:
    schedule, model = witness_schedule(6, 6), Witness()
    with sc.cached(model, schedule) as run:
        for step, windows in enumerate(("ab", "ab", "ab", "b", "ab", "ab")):
            for window in windows:
                x, t = torch.randn(1, 2, 2), torch.tensor([1000.0 - 100 * step])
                model.tell(0, window, step, x, t, PROMPTS["c"])
    assert model.foreign() == [((0, "b", 3), (0, "a", 1))]  # known when the next step begins
    assert run.summary().recomputed["the calls of a step could not be told apart"] == 4


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("interval", [2, 4, 6])
def test_nothing_is_held_after_the_last_step(pattern: str, interval: int) -> None:
    """But for a branch left out in the last step alone, which nobody knows not to come."""
    schedule, model = witness_schedule(6, interval), Witness()
    branches = PATTERNS[pattern]
    with sc.cached(model, schedule) as run:
        guided(model, branches, CONDITIONS["made anew"])
        left_out_alone = len(branches[-2]) > len(branches[-1])
        assert run.summary().held_bytes == 16 * left_out_alone
        guided(model, ("c",) * 6, CONDITIONS["made anew"], generation=1)
        assert run.summary().held_bytes == 0
    model.assert_right(run)


def test_a_branch_that_comes_back_in_the_very_last_step_is_right() -> None:
    schedule, model = witness_schedule(4, 4), Witness()
    with sc.cached(model, schedule) as run:
        guided(model, ("uc", "uc", "c", "cu"), CONDITIONS["labels"])
        assert run.summary().held_bytes == 0
    model.assert_right(run)
    assert run.summary().recomputed == {"no value had been computed for this call": 1}


def test_prompts_that_differ_in_few_elements_of_many() -> None:
    """A map with two channels, of which one is the same for both branches."""
    maps = {branch: torch.zeros(1, 256, 256, 2) for branch in "cu"}
    maps["c"][..., 1] = 1
    schedule, model = witness_schedule(4, 4), Witness()
    with sc.cached(model, schedule):
        guided(model, ("c", "uc", "uc", "c"), lambda branch, step: maps[branch])
    assert model.foreign() == []


def test_a_value_older_than_the_schedule_means_is_computed_again() -> None:
    for predictor in (name for name, x in sc.PREDICTORS.items() if x.axis == "step"):
        schedule, model = witness_schedule(8, 3, predictor), Witness()
        with sc.cached(model, schedule) as run:
            guided(model, ("uc", "uc", "uc", "c", "uc", "uc", "uc", "uc"), CONDITIONS["made anew"])
        assert run.summary().recomputed == {"no value had been computed for this call": 1}
