"""Calls of a step, told apart by name, by conditioning, or by order."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from smoothcache.tracking.branches import Branches


def numbers(
    branches: Branches, steps: list[list[Any]], argument: str = "text"
) -> list[list[int | None]]:
    """The branch of every call; each call is given as the list of what it is conditioned on."""

    def conditioning(call: Any) -> dict[str, list[Any]]:
        values = call if isinstance(call, list) else [call]
        return {argument + "_more" * i: [value] for i, value in enumerate(values)}

    return [
        [branches.number(step, conditioning(call), None, torch.randn(1, 2)) for call in calls]
        for step, calls in enumerate(steps)
    ]


def embedding(seed: int) -> Tensor:
    return torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(seed))


def test_names_settle_it() -> None:
    branches, same = Branches(), {"text": [embedding(0)]}
    assert branches.number(0, same, "cond") == 0
    assert branches.number(0, same, "uncond") == 1
    assert branches.number(1, same, "uncond") == 1
    assert branches.number(1, same, "cond") == 0


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("make", [embedding, lambda seed: torch.tensor([seed]), lambda seed: seed])
def test_conditioning_settles_it_as_the_same_object_or_by_its_content(
    make: Any, fresh: bool
) -> None:
    known = {seed: make(seed) for seed in (1, 2)}

    def given(seed: int) -> Any:
        return make(seed) if fresh else known[seed]

    c, u = 1, 2
    order = [[u, c], [c, u], [c], [u], [u, c]]
    branches = Branches()
    got = numbers(branches, [[given(x) for x in calls] for calls in order])
    assert got == [[0, 1], [1, 0], [1], [0], [0, 1]]


def test_a_branch_that_begins_later_is_not_taken_for_the_first() -> None:
    c, u = embedding(1), embedding(2)
    assert numbers(Branches(), [[c], [c], [u, c], [u, c], [c]]) == [[0], [0], [1, 0], [1, 0], [0]]
    assert numbers(Branches(), [[c], [u, c], [u, c], [c]]) == [[0], [1, 0], [1, 0], [0]]


def test_equal_conditioning_is_taken_in_order_where_latents_differ() -> None:
    c = embedding(1)
    assert numbers(Branches(), [[c], [c, c], [c, c]]) == [[0], [0, 1], [0, 1]]
    assert numbers(Branches(), [[[], []], [[], []]]) == [[0, 1], [0, 1]]


def test_what_varies_with_the_step_tells_nothing_of_the_branch() -> None:
    controls = [[embedding(10 + step)] for step in range(5)]
    for name in ("control", "block_residuals", "options.sigmas", "step_index"):
        assert numbers(Branches(), controls, name) == [[0]] * 5  # from the first step on
    scalars = [[float(step)] for step in range(5)]
    assert numbers(Branches(), scalars, "anything")[2:] == [[0]] * 3


def test_what_varies_does_not_hide_what_does_not() -> None:
    c, u = embedding(1), embedding(2)
    steps = [[[x, float(10 * step + i)] for i, x in enumerate((c, u))] for step in range(5)]
    steps[4] = steps[4][1:]
    got = numbers(Branches(), steps)
    assert got[3][0] != got[3][1] and got[4] == [got[3][1]]


def test_a_prompt_that_varies_with_the_step_cannot_be_told() -> None:
    fading = [[embedding(10 + step)] for step in range(5)]
    assert numbers(Branches(), fading, "prompt") == [[0], [1], [None], [None], [None]]


def test_more_calls_alike_than_the_solver_makes_cannot_be_told() -> None:
    c = {"text": [embedding(3)]}
    branches = Branches()

    def number(step: int, stages: int | None) -> int | None:
        return branches.number(step, c, None, torch.randn(1, 4), stages=stages)

    assert [number(0, 1), number(1, 2), number(1, 2), number(2, 1)] == [0, 0, 1, 0]
    assert [number(3, 1), number(3, 1), number(4, 1)] == [0, None, None]
    branches.forget()
    assert [number(step, None) for step in (0, 0, 1, 1, 2, 2)] == [0, 1, 0, 1, 0, 1]
    assert [number(3, None) for _ in range(6)] == [0, 1, 2, 3, None, None]
    assert [number(4, None) for _ in range(2)] == [None, None]  # their number varies


@pytest.mark.parametrize("named", [None, "a name"])
@pytest.mark.parametrize("made_anew", [False, True])
def test_calls_with_the_same_latents_cannot_be_told_if_conditioned_alike(
    named: str | None, made_anew: bool
) -> None:
    x, c = embedding(1), {"text": [embedding(3)]}
    branches = Branches()

    def number(step: int, conditioning: Any = c) -> tuple[int | None, int | None]:
        branch = branches.number(step, conditioning, named, x.clone() if made_anew else x)
        return branch, branches.confused

    assert [number(0), number(1)] == [(0, None), (0, None)]
    assert [number(1), number(1), number(2)] == [(None, 0), (None, None), (None, None)]
    if named is None:
        assert number(2, {"text": [embedding(4)]}) == (1, None)
    x.add_(1)
    branches.forget()
    assert number(0) == (0, None)


def test_a_prompt_that_changes_is_a_branch_of_its_own() -> None:
    a, b = embedding(1), embedding(2)
    assert numbers(Branches(), [[a], [a], [b], [b]]) == [[0], [0], [1], [1]]


def test_other_shapes_and_types_are_other_branches() -> None:
    x = torch.ones(2, 3)
    for other in (torch.ones(3, 3), torch.ones(2, 3, dtype=torch.float64), 1.0, "one"):
        assert numbers(Branches(), [[x], [other]]) == [[0], [1]]
    assert numbers(Branches(), [[[x]], [[x, x]]]) == [[0], [1]]


def test_a_write_into_the_conditioning_is_noticed() -> None:
    label = torch.tensor([1])
    branches = Branches()
    assert branches.number(0, {"text": [label]}, None) == 0
    label.fill_(2)
    assert branches.number(0, {"text": [label]}, None) == 1
    label.fill_(1)
    assert branches.number(1, {"text": [label]}, None) == 0
    with torch.inference_mode():
        label, branches = torch.tensor([1]), Branches()
        assert branches.number(0, {"text": [label]}, None) == 0
        label.fill_(2)
        assert branches.number(0, {"text": [label]}, None) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.complex64, torch.bool])
def test_all_types_have_contents(dtype: torch.dtype) -> None:
    a, b = (embedding(seed).gt(0).to(dtype) for seed in (1, 2))
    assert numbers(Branches(), [[a], [b.clone(), a.clone()]]) == [[0], [1, 0]]


def test_a_number_that_was_expanded_has_contents() -> None:
    """As guidance is in a batch of one."""
    numbers_given = [torch.tensor(float(i)).expand(1) for i in (3, 3, 5)]
    assert numbers(Branches(), [[x] for x in numbers_given]) == [[0], [0], [1]]


def test_nothing_is_kept_alive_and_meta_tensors_have_no_contents() -> None:
    branches, x = Branches(), embedding(1)
    branches.number(0, {"text": [x]}, None)
    ref = weakref.ref(x)
    del x
    gc.collect()
    assert ref() is None
    there = torch.zeros(2, device="meta")
    assert numbers(Branches(), [[there], [there], [torch.zeros(2, device="meta")]]) == [
        [0],
        [0],
        [1],
    ]


def test_forgetting_begins_anew() -> None:
    branches = Branches()
    numbers(branches, [[1, 2]])
    branches.forget()
    assert numbers(branches, [[2, 1]]) == [[0, 1]]


def test_calls_in_any_order_beside_a_control_that_changes() -> None:
    c, u = embedding(1), embedding(2)
    branches = Branches()
    got = []
    for step, order in enumerate(((c, u), (u, c), (c, u), (c,), (u, c))):
        given = {"control": [embedding(10 + step)], "options.sigmas": [9.0 - step, 1.0][step % 2 :]}
        got.append([branches.number(step, {"text": [x], **given}, None) for x in order])
    assert got == [[0, 1], [1, 0], [0, 1], [0], [1, 0]]


def test_calls_that_differ_in_a_changing_control_alone_are_never_mixed() -> None:
    steps = [[embedding(10 * step + call) for call in range(2)] for step in range(4)]
    branches = Branches()
    seen = []
    for step, calls in enumerate(steps):
        for control in calls:
            number = branches.number(step, {"control": [control]}, None, torch.randn(1, 2))
            seen.append((number, branches.confused))
    assert seen[:2] == [(0, None), (1, None)]
    assert all(number is None for number, _ in seen[2:])


def windows(moves: bool, count: int) -> list[list[int | None]]:
    """The branches of windows of a noise that hardly changes, over four steps."""
    branches, x, got = Branches(), torch.randn(count, 256), []
    for step in range(4):
        rows = x.roll(step * moves, 0) + 0.1 * torch.randn(count, 256)
        got.append([branches.number(step, {}, None, row[None]) for row in rows])
    return got


def test_windows_that_move_are_told_no_branch() -> None:
    torch.manual_seed(0)
    for count in (3, 6):
        assert windows(False, count) == [list(range(count))] * 4
        assert windows(True, count)[1:] == [[None] * count] * 3
