"""Which generation, step and call: one test for each rule of the clock."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from smoothcache.errors import ScheduleMismatchError
from smoothcache.model.arguments import Signature
from smoothcache.tracking.clock import Clock
from smoothcache.tracking.timesteps import timestep_value


def clock_of(expected: Sequence[float] | None = None) -> Clock:
    return Clock(lambda: None, expected)


def places(clock: Clock, timesteps: Sequence[float], latents: Tensor | None = None) -> list[Any]:
    ticks = [clock.tick(t, latents) for t in timesteps]
    return [(tick.step, tick.call, tick.starts) for tick in ticks]


def test_each_further_timestep_is_a_step() -> None:
    clock = clock_of()
    assert places(clock, [9, 6, 3]) == [(0, 0, True), (1, 0, False), (2, 0, False)]
    assert clock.timesteps == [9, 6, 3]


def test_timesteps_may_rise() -> None:
    assert places(clock_of(), [0.0, 0.5, 1.0]) == [(0, 0, True), (1, 0, False), (2, 0, False)]


def test_an_unchanged_timestep_is_another_call_of_the_step() -> None:
    x = torch.zeros(1, 2)
    clock = clock_of()
    assert places(clock, [9, 9, 6, 6, 6, 3], x) == [
        (0, 0, True),
        (0, 1, False),
        (1, 0, False),
        (1, 1, False),
        (1, 2, False),
        (2, 0, False),
    ]
    assert clock.timesteps == [9, 6, 3]


@pytest.mark.parametrize("times", [[9, 6, 3], [0.1, 0.2, 0.3]])
def test_turning_back_is_a_new_generation(times: list[float]) -> None:
    clock = clock_of()
    once = places(clock, times)
    assert places(clock, times) == once
    assert places(clock, times) == once
    assert clock.timesteps == times


def test_a_generation_broken_off_after_two_steps() -> None:
    clock = clock_of()
    places(clock, [9, 6])
    assert places(clock, [9, 6, 3])[0] == (0, 0, True)


def test_what_is_forgotten_starts_anew() -> None:
    clock = clock_of()
    places(clock, [9])
    clock.forget()
    assert places(clock, [9, 6]) == [(0, 0, True), (1, 0, False)]


def test_the_first_call_of_a_generation_vouches_for_nothing() -> None:
    assert [clock_of().tick(9, None).same_generation] == [False]


def test_two_calls_with_the_same_latents_belong_to_one_generation() -> None:
    clock, x = clock_of(), torch.zeros(1, 2)
    ticks = [clock.tick(t, x) for t in (9, 9, 6, 6)]
    assert [tick.same_generation for tick in ticks] == [False, True, True, True]


def test_two_first_calls_with_other_latents_may_be_two_generations() -> None:
    clock = clock_of()
    ticks = [clock.tick(t, torch.zeros(1, 2)) for t in (9, 9, 6, 6, 3, 3)]
    assert [tick.step for tick in ticks] == [0, 0, 1, 1, 2, 2]
    assert [tick.same_generation for tick in ticks[2:]] == [False, False, True, True]


def test_two_first_calls_with_latents_changed_between_them() -> None:
    clock, x = clock_of(), torch.zeros(1, 2)
    clock.tick(9, x)
    x.add_(1)
    clock.tick(9, x)
    assert not clock.tick(6, x).same_generation
    assert clock.tick(3, x).same_generation


def test_latents_of_inference_mode_have_no_version() -> None:
    clock = clock_of()
    with torch.inference_mode():
        x = torch.zeros(1, 2)
        ticks = [clock.tick(t, x) for t in (9, 9, 6)]
    assert ticks[-1].same_generation


def test_the_clock_keeps_no_latents_alive() -> None:
    clock, x = clock_of(), torch.zeros(1, 2)
    clock.tick(9, x)
    import weakref

    ref = weakref.ref(x)
    del x
    assert ref() is None


def test_leaving_the_expected_timesteps_does_not_prove_the_same_generation() -> None:
    clock = clock_of([9, 6, 3])
    assert [clock.tick(t, None).same_generation for t in (9, 6.001, 3)] == [False, True, True]
    clock.forget()
    # Broken off after 9, and begun again in the middle of another list.
    assert [clock.tick(t, None).same_generation for t in (9, 4, 2)] == [False, False, True]


def test_other_timesteps_than_expected_from_the_start() -> None:
    clock = clock_of([9, 6, 3])
    assert [clock.tick(t, None).same_generation for t in (8, 5, 2)] == [False, True, True]


def test_a_lone_call_before_the_planned_start() -> None:
    clock = clock_of([9, 6, 3])
    assert places(clock, [5, 9, 6, 3]) == [(0, 0, True), (0, 0, True), (1, 0, False), (2, 0, False)]


class Announcer:
    def __init__(self, timesteps: Sequence[float]) -> None:
        self.timesteps = torch.tensor(timesteps)
        self.clock = Clock(lambda: self.timesteps)

    def announce(self, timesteps: Sequence[float]) -> None:
        self.timesteps = torch.tensor(timesteps)


def test_a_new_list_is_a_new_generation() -> None:
    scheduler = Announcer([9, 6, 3])
    assert places(scheduler.clock, [9]) == [(0, 0, True)]
    scheduler.announce([9, 6, 3])
    assert places(scheduler.clock, [9, 6]) == [(0, 0, True), (1, 0, False)]
    assert scheduler.clock.num_steps == 3


def test_a_list_does_not_tell_two_first_calls_from_two_generations() -> None:
    scheduler = Announcer([9, 6, 3])
    ticks = [scheduler.clock.tick(t, torch.zeros(1, 2)) for t in (9, 9, 6, 6, 3)]
    assert [tick.same_generation for tick in ticks] == [False, True, False, False, True]


def test_starting_in_the_middle_of_the_list() -> None:
    """A plan for the whole list goes on in its middle, one for the rest begins there."""
    timesteps = torch.tensor([9.0, 6.0, 3.0, 1.0])
    for planned, first in ((4, 2), (2, 0), (None, 0)):
        clock = Clock(lambda: timesteps, planned=planned)
        assert places(clock, [3, 1]) == [(first, 0, True), (first + 1, 0, False)]
        assert clock.num_steps == (planned or 2)


@pytest.mark.parametrize(
    "unit", [lambda t: t, lambda t: t / 1000, lambda t: 1 - t / 1000, lambda t: 1000 - t]
)
def test_denoisers_have_timesteps_in_units_of_their_own(unit: Any) -> None:
    announced = torch.linspace(1000.0, 100.0, 10)
    clock = Clock(lambda: announced, planned=10)
    steps = [clock.tick(unit(t), None).step for t in announced.tolist()]
    assert steps == list(range(10)) and clock.num_steps == 10


def test_what_comes_after_the_last_step_is_not_of_its_generation() -> None:
    solver = CountingSolver([9.0, 6.0, 3.0])
    clock = solver.clock()
    for solver.position, t in enumerate([9.0, 6.0, 3.0]):
        clock.tick(t, None)
    solver.position = 3
    assert [clock.tick(t, None).inside for t in (8.0, 4.0)] == [False, False]
    assert clock.num_steps is None
    solver.timesteps, solver.position = torch.tensor([9.0, 6.0, 3.0]), 0
    assert clock.tick(9.0, None).starts


def test_what_is_not_in_the_list_is_not_of_its_generation() -> None:
    scheduler = Announcer([900.0, 600.0, 300.0])
    places(scheduler.clock, [900.0, 600.0])
    assert not scheduler.clock.tick(450.0, None).inside
    places(scheduler.clock, [900.0, 600.0, 300.0])
    assert not scheduler.clock.tick(50.0, None).inside
    assert places(scheduler.clock, [900.0, 600.0]) == [(0, 0, True), (1, 0, False)]


@pytest.mark.parametrize(("lone", "times"), [(600, [1000, 750, 500]), (0.5, [0.0, 0.4, 0.8])])
def test_a_lone_call_before_a_generation_without_a_plan_of_its_times(
    lone: float, times: list[float]
) -> None:
    clock = Clock(planned=3)
    assert places(clock, [lone, *times])[1:] == [(0, 0, True), (1, 0, False), (2, 0, False)]
    assert places(clock, [lone])[0] == (0, 0, True)
    assert places(clock, times) == [(0, 0, True), (1, 0, False), (2, 0, False)]


def test_solvers_that_list_a_timestep_twice() -> None:
    scheduler = Announcer([9, 6, 6, 3, 3])  # Heun
    assert places(scheduler.clock, [9, 6, 6, 3, 3]) == [
        (0, 0, True),
        (1, 0, False),
        (1, 1, False),
        (2, 0, False),
        (2, 1, False),
    ]
    assert scheduler.clock.num_steps == 3


def test_without_a_scheduler_the_number_of_steps_is_not_known() -> None:
    assert clock_of().num_steps is None


@pytest.mark.parametrize(
    ("given", "value"),
    [
        (500, 500.0),
        (0.25, 0.25),
        (np.float32(0.5), 0.5),
        (torch.tensor(7), 7.0),
        (torch.tensor([7]), 7.0),
        (torch.tensor([7, 7, 7]), 7.0),
        (torch.tensor(0.75, dtype=torch.bfloat16), 0.75),
        (torch.tensor([500], dtype=torch.float16), 500.0),
        (torch.tensor([[0.0, 5.0, 5.0]]), 5.0),
    ],
    ids=str,
)
def test_timesteps_of_all_types(given: Any, value: float) -> None:
    assert timestep_value(given) == value


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("now", "str"),
        (None, "NoneType"),
        (torch.zeros(0), "no number"),
        (torch.tensor([3, 4]), "3 to 4"),
    ],
    ids=str,
)
def test_timesteps_that_tell_no_step(given: Any, words: str) -> None:
    with pytest.raises(ScheduleMismatchError, match=words):
        timestep_value(given)


def module_with(forward: Any) -> torch.nn.Module:
    return type("Made", (torch.nn.Module,), {"forward": forward})()


def test_the_timestep_among_the_arguments() -> None:
    named = Signature(module_with(lambda self, x, timestep=None, *, y=None: None))
    assert named.timestep == "timestep"
    assert named.sort((1, 2), {}).timestep == 2
    assert named.sort((1,), {"timestep": 3}).timestep == 3
    unnamed = Signature(module_with(lambda self, *args, **kwargs: None))
    assert unnamed.timestep is None
    assert unnamed.sort((torch.zeros(2, 2), torch.tensor([4.0])), {}).timestep == 4
    assert unnamed.sort((torch.zeros(2, 2),), {"flag": True, "when": 0.5}).timestep == 0.5
    assert unnamed.sort((torch.zeros(2, 2),), {}).timestep is None
    of_two = Signature(module_with(lambda self, frames, video_timesteps, sound_timesteps: None))
    assert of_two.timestep == "video_timesteps"


def test_the_latents_among_the_arguments() -> None:
    x, text = torch.zeros(1, 2), torch.zeros(1, 3)
    unnamed = Signature(module_with(lambda self, *args, **kwargs: None))
    assert unnamed.sort((torch.zeros(1), x), {"text": text}).latents is x
    assert unnamed.sort((), {"t": torch.zeros(1), "x": x, "text": text}).latents is x
    assert unnamed.sort((1,), {}).latents is None
    named = Signature(module_with(lambda self, text, hidden_states, t: None))
    assert named.sort((text, x, 1), {}).latents is x
    listed = Signature(module_with(lambda self, x, t: None))
    assert listed.sort(([x, x], 1), {}).latents is x


def test_what_a_call_is_conditioned_on() -> None:
    x, text, sound = torch.zeros(1, 2), torch.zeros(1, 3), torch.zeros(1, 4)
    signature = Signature(
        module_with(lambda self, hidden_states, timestep, timestep_r, audio_hidden_states, c: None)
    )
    call = signature.sort((x, 5, 4, sound, {"text": [text], "scale": 2.0, "none": None}), {})
    assert call.latents is x and call.timestep == 5
    assert list(call.conditioning) == ["c"]
    assert call.conditioning["c"][0] is text and call.conditioning["c"][1] == 2.0
    assert not signature.sort((x, 5, 4, sound, x.clone()), {}).conditioning


class CountingSolver:
    """A noise scheduler that lists its timesteps and says at which it is."""

    def __init__(self, timesteps: list[float]) -> None:
        self.timesteps = torch.tensor(timesteps)
        self.position = 0

    def clock(self) -> Clock:
        return Clock(lambda: self.timesteps, None, lambda: self.position)


@pytest.mark.parametrize("calls", [1, 2])
def test_timesteps_that_round_to_the_same_number_are_steps_of_their_own(calls: int) -> None:
    solver = CountingSolver([1000.0, 999.0, 997.0, 500.0])
    clock = solver.clock()
    for step, rounded in enumerate([1000.0, 1000.0, 996.0, 500.0]):  # as in bfloat16
        solver.position = step
        for call in range(calls):
            tick = clock.tick(rounded, None)
            assert (tick.step, tick.call, tick.starts) == (step, call, step == call == 0)


def test_a_solver_that_lists_a_timestep_twice_calls_twice_in_a_step() -> None:
    solver = CountingSolver([900.0, 500.0, 500.0, 100.0, 100.0])
    clock = solver.clock()
    places = []
    for position, timestep in enumerate(solver.timesteps.tolist()):
        solver.position = position
        tick = clock.tick(timestep, None)
        places.append((tick.step, tick.call))
    assert places == [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1)]


@pytest.mark.parametrize("times", [[1000.0, 889.0, 500.0, 9.0, 1.0], [9.0, 6.0, 3.0]])
def test_a_scheduler_that_is_never_stepped(times: list[float]) -> None:
    solver = CountingSolver(times)
    clock = solver.clock()
    for _ in range(2):
        assert [clock.tick(t, None).step for t in times] == list(range(len(times)))
    assert clock.num_steps == len(times)


@pytest.mark.parametrize("times", [[10, 8, 9, 7], [10, 8, 6, 9], [0.1, 0.3, 0.2]])
def test_timesteps_that_turn_back_while_the_latents_go_on_are_refused(times: list[float]) -> None:
    x = torch.randn(1, 4, 8, 8)
    clock = clock_of()
    with pytest.raises(ScheduleMismatchError, match=r"timesteps reverse from .* restart sampling"):
        for t in times:
            x = x + 0.1 * torch.randn_like(x)
            clock.tick(t, x)
    clock = clock_of()
    for t in times:  # other latents: another generation
        clock.tick(t, torch.randn(1, 4, 8, 8))


def test_an_embedding_is_no_time() -> None:
    with pytest.raises(ScheduleMismatchError, match="timestep embedding"):
        timestep_value(torch.linspace(-1, 1, 32)[None])


def test_the_first_parameter_has_any_name() -> None:
    signature = Signature(module_with(lambda this, x, t, y: None))
    x = torch.zeros(1, 4)
    assert signature.sort((x, 5, 1), {}).timestep == 5
    assert signature.sort((x, 5, 1), {}).latents is x


def test_ids_and_positions_are_no_latents() -> None:
    packed = Signature(
        module_with(lambda self, position_ids, vision_tokens, vision_timesteps: None)
    )
    ids, x = torch.zeros(3, 4, dtype=torch.long), torch.zeros(1, 2, 1, 2, 2)
    assert packed.sort((ids, [x], torch.ones(4)), {}).latents is x


def test_what_follows_the_steps_inside_a_mapping_has_a_name_of_its_own() -> None:
    signature = Signature(module_with(lambda self, x, t, options: None))
    options = {"sigmas": torch.ones(1), "cond_or_uncond": [0, 1], "uuids": ["a", "b"]}
    call = signature.sort((torch.zeros(1, 4), 5, options), {})
    assert call.conditioning["options"] == (0, 1, "a", "b")
    assert len(call.conditioning["options.sigmas"]) == 1
