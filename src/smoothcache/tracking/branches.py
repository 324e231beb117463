"""Identifies the guidance branch of each denoiser call.

Guidance calls the denoiser several times per step, with and without the prompt, possibly in some
steps only. The values of one *branch* must never be reused in another. A branch is identified by
its ``cache_context`` name or, without one, by its conditioning: all inputs of the denoiser except
the timestep and the latents.

Controls, sigmas and step numbers change between steps. They distinguish branches only if two calls
of one step differ in nothing else, or if their values recur.

Several calls with the same conditioning are either stages of a solver step (Heun, for example) or
windows of a longer video. They are numbered in call order as long as the latents of each call
continue those of the step before; otherwise their branch is unknown. Calls with equal latents
differ in something hidden, as in guidance by a perturbed model, so their branch is unknown too.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..model.arguments import MOVING_NAME
from ..model.digests import are_equal, correlation, digest, sketch, version

Place = tuple[int | None, int]
"""The guidance branch of a call, and the number of earlier uses of the layer in that call."""

# Arguments that may change at every step although the prompt stays the same.
_NO_PROMPT = re.compile(
    r"control|residual|ref|mask|ids|noise|scale|guidance|step|image|video|audio"
)
_MAX_STAGES = 4  # calls of a step with equal conditioning and latents too small to compare
_MAX_WINDOWS = 64  # calls of a step with equal conditioning and comparable latents
_MIN_WINDOW_CORRELATION = 0.8  # of one window's latents in two consecutive steps
_MIN_STAGE_CORRELATION = 0.9  # of the latents of two stages of a step


class Branches:
    """Numbers the calls of a denoiser so that a branch has the same number in every step.

    Attributes:
        confused: Branch number of an earlier call of the step that the last call cannot be
            distinguished from. Set at the first such call of a generation, otherwise None.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Resets the state; the next call starts a new generation."""
        self._inputs: dict[Hashable, _InputHistory] = {}
        self._groups: list[dict[Hashable, int]] = []
        self._called: set[int] = set()  # groups with a call in this step
        self._merged: set[int] = set()  # called groups with new values of moving inputs
        self._sketches: dict[Hashable, list[Tensor | None]] = {}
        self._sketches_before: dict[Hashable, list[Tensor | None]] = {}
        self._numbers: dict[tuple[Hashable, int], int] = {}
        self._uses: dict[Hashable, int] = {}
        self._counts: dict[Hashable, list[int]] = {}  # calls per step, if the solver gives none
        self._latents: dict[Hashable, list[tuple[_Value | None, int]]] = {}
        self._ambiguous: set[Hashable] = set()
        self._step = -1
        self.confused: int | None = None

    def number(
        self,
        step: int,
        conditioning: Mapping[str, Sequence[Any]],
        name: str | None,
        latents: Tensor | None = None,
        *,
        stages: int | None = None,
        position: int | None = None,
        same_generation: bool = True,
    ) -> int | None:
        """Returns the branch number of a call; None if the branch is unknown.

        Args:
            step: Index of the solver step.
            conditioning: Inputs other than timestep and latents, flattened, by argument name.
            name: The ``cache_context`` name; None outside a context.
            latents: The latents being denoised.
            stages: Number of calls per branch in this step, if the solver gives it.
            position: Position of the solver, if it counts; different for each of its stages.
            same_generation: Whether the previous step certainly belongs to the same generation.
        """
        if step != self._step:
            self._begin(step)
        if not same_generation:
            self._sketches_before = {}
        self.confused = None
        group = self._group(step, conditioning, latents) if name is None else name
        if group is None:
            return None
        use = self._uses[group] = self._uses.get(group, -1) + 1
        duplicate = self._earlier_use(latents, group, position)
        if duplicate is not None and group not in self._ambiguous:
            self.confused = self._numbers.get((group, duplicate))
        if duplicate is not None or (stages is not None and use >= stages):
            self._ambiguous.add(group)
        if stages is not None:
            self._counts.pop(group, None)
        elif use == 0:
            self._counts.setdefault(group, []).append(1)
        elif group in self._counts:
            self._counts[group][-1] += 1
        if name is None and not self._continues_latents(group, latents):
            self._ambiguous.add(group)
        most = _MAX_STAGES if self._sketches.get(group, [None])[-1] is None else _MAX_WINDOWS
        if group in self._ambiguous or use >= most:
            return None
        return self._numbers.setdefault((group, use), len(self._numbers))

    def _begin(self, step: int) -> None:
        """Starts another step and marks groups whose number of calls varies as ambiguous.

        A missing call is detected only here. The first step of a solver may have fewer calls.
        """
        for group, counts in self._counts.items():
            if len(set(counts[1:])) > 1:
                self._ambiguous.add(group)
            del counts[2:]
        self._step, self._uses = step, {}
        self._latents.clear()
        self._sketches, self._sketches_before = {}, self._sketches
        self._called, self._merged = set(), set()

    def _earlier_use(
        self, latents: Tensor | None, group: Hashable, position: int | None
    ) -> int | None:
        """Returns the index of an earlier call of the group in this step with equal latents."""
        earlier = self._latents.setdefault((group, position), [])
        for value, use in earlier:
            if value is None or latents is None or value.is_of(latents):
                return use
        value = None if latents is None else _Value(latents)
        earlier.append((value, self._uses[group]))
        return None

    def _continues_latents(self, group: Hashable, latents: Tensor | None) -> bool:
        """Whether the latents of a call continue those of the same call in the previous step.

        Relevant only if a step has several calls with equal conditioning. Stages of one step have
        similar latents. A window must be closer to itself than to any other window.
        """
        now = self._sketches.setdefault(group, [])
        now.append(None if latents is None else sketch(latents, least=64, most=4096))
        before, use = self._sketches_before.get(group, []), len(now) - 1
        if use == 0 and len(before) < 2:
            return True
        if use >= len(before) or now[-1] is None:
            return True
        correlations = [correlation(now[-1], other) for other in before]
        same, others = correlations[use], correlations[:use] + correlations[use + 1 :]
        if same is None or any(x is None for x in others):
            return True
        siblings = [correlation(before[use], x) or 0.0 for i, x in enumerate(before) if i != use]
        are_stages = min(siblings, default=0.0) > _MIN_STAGE_CORRELATION
        return same > (_MIN_WINDOW_CORRELATION if not are_stages else 0.5) and (
            are_stages or same > max((x for x in others if x is not None), default=0.0)
        )

    def _group(
        self, step: int, conditioning: Mapping[str, Sequence[Any]], latents: Tensor | None
    ) -> Hashable:
        """Returns the index of the calls with this conditioning; None if it is unknown."""
        values: dict[Hashable, int] = {}
        for name, leaves in conditioning.items():
            moves = MOVING_NAME.search(name) is not None
            if moves:
                values[name] = self._input(name, moves=True).index(step, tuple(leaves))
                continue
            for i, leaf in enumerate(leaves):
                moves = _is_map_over(leaf, latents)
                values[name, i] = self._input((name, i), moves=moves).index(step, (leaf,))
        inputs = self._inputs
        if any(inputs[key].is_unusable for key in values):
            return None
        fixed = [key for key in inputs if not inputs[key].varies]
        candidates = [
            index
            for index, group in enumerate(self._groups)
            if all(group.get(key) == values.get(key) for key in fixed if not inputs[key].is_moving)
        ]
        same = [
            i for i in candidates if all(self._groups[i].get(k) == values.get(k) for k in fixed)
        ]
        if same:
            index = same[0]
            if index in self._merged:  # an earlier call of this step had other moving values
                self.confused = self._numbers.get((index, 0))
                self._ambiguous.add(index)
        elif len(candidates) == 1 and candidates[0] not in self._called:
            index = candidates[0]
            self._groups[index] = values
            self._merged.add(index)
            self._called.add(index)
            return index
        elif len(candidates) > 1 or any(i in self._merged for i in candidates):
            # Several calls of a step differ in moving inputs alone, and these have changed.
            for earlier in self._merged.intersection(candidates):
                self.confused = self._numbers.get((earlier, 0))
            self._ambiguous.update(candidates)
            return None
        else:
            index = len(self._groups)
            self._groups.append(values)
        self._called.add(index)
        return index

    def _input(self, key: Hashable, *, moves: bool) -> _InputHistory:
        if key not in self._inputs:
            name = key if isinstance(key, str) else str(key[0])  # type: ignore[index]
            may_vary = _NO_PROMPT.search(name) is not None or moves
            self._inputs[key] = _InputHistory(may_vary, moves)
        return self._inputs[key]


class _InputHistory:
    """The distinct values that one input of the denoiser has had.

    Args:
        may_vary: Whether its name and value allow it to depend on the step.
        moves: Whether it depends on the step from its first change on.

    Attributes:
        varies: Whether it had a new value in each of three steps and no value recurred. It then
            depends on the step (a control signal, for example) and does not identify a branch.
    """

    def __init__(self, may_vary: bool, moves: bool) -> None:
        self._may_vary = may_vary
        self._moves = moves
        self.varies = False
        self._values: list[list[_Value]] = []
        self._first_steps: list[int] = []  # the first step with each value
        self._steps_with_new: set[int] = set()
        self._has_recurred = False

    @property
    def is_moving(self) -> bool:
        """Whether a new value does not imply a new branch."""
        return self._moves and not self._has_recurred

    @property
    def is_unusable(self) -> bool:
        """Whether a prompt-like input differs at every step, such as a prompt that fades."""
        return self.varies and not self._may_vary

    def index(self, step: int, leaves: tuple[Any, ...]) -> int:
        """Returns the index of these leaves among the distinct values so far."""
        if self.varies:
            return 0
        for index, value in enumerate(self._values):
            if len(value) == len(leaves) and all(
                x.is_of(leaf) for x, leaf in zip(value, leaves, strict=True)
            ):
                self._has_recurred |= step > self._first_steps[index]
                return index
        self._values.append([_Value(leaf) for leaf in leaves])
        self._first_steps.append(step)
        self._steps_with_new.add(step)
        are_numbers = all(not isinstance(leaf, Tensor) or leaf.ndim < 2 for leaf in leaves)
        self._may_vary = self._may_vary or are_numbers
        self.varies = not self._has_recurred and len(self._steps_with_new) >= 3
        return len(self._values) - 1


class _Value:
    """A value that can be recognised by identity or content without keeping it alive."""

    def __init__(self, leaf: Any) -> None:
        self._plain = None if isinstance(leaf, Tensor) else leaf
        self._signature = _signature(leaf)
        self._digest = digest(leaf) if isinstance(leaf, Tensor) else None
        self._remember(leaf)

    def is_of(self, leaf: Any) -> bool:
        """Whether a leaf has this value; on an accelerator, a new object costs a host sync."""
        if self._signature != _signature(leaf):
            return False
        if not isinstance(leaf, Tensor):
            return bool(self._plain == leaf)
        same_object = self._tensor is not None and self._tensor() is leaf
        # Without a version counter, the content is compared, which is cheap on the CPU only.
        counts_writes = self._version is not None or leaf.device.type != "cpu"
        if same_object and counts_writes and self._version == version(leaf):
            return True
        if not are_equal(digest(leaf), self._digest):
            return False
        self._remember(leaf)
        return True

    def _remember(self, leaf: Any) -> None:
        self._tensor = weakref.ref(leaf) if isinstance(leaf, Tensor) else None
        self._version = version(leaf) if isinstance(leaf, Tensor) else None


def _signature(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, leaf.device
    return type(leaf)


def _is_map_over(leaf: Any, latents: Tensor | None) -> bool:
    """Whether a leaf is a spatial map over the latents, such as a control image."""
    if not isinstance(leaf, Tensor) or latents is None or min(leaf.ndim, latents.ndim) < 4:
        return False
    if leaf.ndim != latents.ndim or leaf.shape[0] != latents.shape[0]:
        return False
    return leaf.shape[2:] == latents.shape[2:]
