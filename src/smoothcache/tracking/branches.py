"""Which of a step's calls is this one? Found again by its name, or by what it is conditioned on.

Guidance calls the denoiser several times in a step, with and without the prompt, and may do so in
some steps only. The values of one such *branch* must never be reused in another. A branch is told
by the name that ``cache_context`` gives it, else by its conditioning: all that the denoiser is
given but the timestep and the latents.

Controls, sigmas and step numbers change between steps. They tell branches apart only where two
calls of one step differ in nothing else, or where their values come back.

Several calls that this cannot tell apart are the stages of a solver's step (Heun's, say) or windows
of a longer video. They are taken in their order as long as the latents of each go on from those of
the step before; once they do not, such calls are told no branch. Calls with the same latents differ
in something hidden, as in guidance by a perturbed model, and are told no branch either.
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
"""The guidance branch of a call, and how often the layer was used in the call before."""

# What may change at every step without being another prompt.
_NO_PROMPT = re.compile(
    r"control|residual|ref|mask|ids|noise|scale|guidance|step|image|video|audio"
)
_MOST_USES = 4  # calls of a step that are alike and too small to be told by their latents
_MOST_WINDOWS = 64  # such calls that their latents tell apart
_GOES_ON = 0.8  # correlation of the latents of a window in two steps, at least
_ALIKE = 0.9  # correlation of the latents of two stages of a step, at least


class Branches:
    """Numbers the calls of a denoiser so that a branch has the same number in every step.

    Attributes:
        confused: The branch that an earlier call of the step was given, if the last call was the
            first in this generation that nothing tells from such a one; either may be the other.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Makes the next call the first one of a new generation."""
        self._positions: dict[Hashable, _Position] = {}
        self._groups: list[dict[Hashable, int]] = []
        self._taken: set[int] = set()  # groups that had a call in this step
        self._merged: set[int] = set()  # those of them whose moving values were new
        self._sketches: dict[Hashable, list[Tensor | None]] = {}
        self._sketches_before: dict[Hashable, list[Tensor | None]] = {}
        self._numbers: dict[tuple[Hashable, int], int] = {}
        self._uses: dict[Hashable, int] = {}
        self._counts: dict[Hashable, list[int]] = {}  # calls in each step, where nobody says
        self._latents: dict[Hashable, list[tuple[_Value | None, int]]] = {}
        self._unsure: set[Hashable] = set()
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
        """The branch of a call; None if it cannot be told.

        Args:
            step: Index of the solver step.
            conditioning: What the call is given besides timestep and latents, flattened, by the
                name of the argument.
            name: What ``cache_context`` calls it; None outside of one.
            latents: What is denoised.
            stages: How often the solver asks in this step for each branch, if it says.
            same_generation: Whether the step before is of the same generation for certain.
            position: Where the solver is, if it counts; no two of its stages are at the same.
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
        alike = self._use_with(latents, group, position)
        if alike is not None and group not in self._unsure:
            self.confused = self._numbers.get((group, alike))
        if alike is not None or (stages is not None and use >= stages):
            self._unsure.add(group)
        if stages is not None:
            self._counts.pop(group, None)
        elif use == 0:
            self._counts.setdefault(group, []).append(1)
        elif group in self._counts:
            self._counts[group][-1] += 1
        if name is None and not self._go_on(group, latents):
            self._unsure.add(group)
        most = _MOST_USES if self._sketches.get(group, [None])[-1] is None else _MOST_WINDOWS
        if group in self._unsure or use >= most:
            return None
        return self._numbers.setdefault((group, use), len(self._numbers))

    def _begin(self, step: int) -> None:
        """Turns to another step; from now on, calls that came in varying number are not trusted.

        One that was left out is noticed only here. A solver's first step may have fewer.
        """
        for group, counts in self._counts.items():
            if len(set(counts[1:])) > 1:
                self._unsure.add(group)
            del counts[2:]
        self._step, self._uses = step, {}
        self._latents.clear()
        self._sketches, self._sketches_before = {}, self._sketches
        self._taken, self._merged = set(), set()

    def _use_with(
        self, latents: Tensor | None, group: Hashable, position: int | None
    ) -> int | None:
        """The earlier call of the group in this step that nothing tells from this one."""
        earlier = self._latents.setdefault((group, position), [])
        for value, use in earlier:
            if value is None or latents is None or value.is_of(latents):
                return use
        value = None if latents is None else _Value(latents)
        earlier.append((value, self._uses[group]))
        return None

    def _go_on(self, group: Hashable, latents: Tensor | None) -> bool:
        """Whether the latents of a call go on from those of the same call in the step before.

        Only of interest where a step has several calls that are alike. Stages of one step resemble
        each other; windows do not, and each has to be nearer to itself than to any other.
        """
        now = self._sketches.setdefault(group, [])
        now.append(None if latents is None else sketch(latents, least=64, most=4096))
        before, use = self._sketches_before.get(group, []), len(now) - 1
        if use == 0 and len(before) < 2:
            return True
        if use >= len(before) or now[-1] is None:
            return True
        likeness = [correlation(now[-1], other) for other in before]
        own, others = likeness[use], likeness[:use] + likeness[use + 1 :]
        if own is None or any(x is None for x in others):
            return True
        siblings = [correlation(before[use], x) or 0.0 for i, x in enumerate(before) if i != use]
        are_stages = min(siblings, default=0.0) > _ALIKE
        return own > (_GOES_ON if not are_stages else 0.5) and (
            are_stages or own > max((x for x in others if x is not None), default=0.0)
        )

    def _group(
        self, step: int, conditioning: Mapping[str, Sequence[Any]], latents: Tensor | None
    ) -> Hashable:
        """Index of the earlier calls that were conditioned in the same way; None if in none."""
        values: dict[Hashable, int] = {}
        for name, leaves in conditioning.items():
            moves = MOVING_NAME.search(name) is not None
            if moves:
                values[name] = self._position(name, moves=True).index(step, tuple(leaves))
                continue
            for i, leaf in enumerate(leaves):
                moves = _is_laid_out_as(leaf, latents)
                values[name, i] = self._position((name, i), moves=moves).index(step, (leaf,))
        positions = self._positions
        if any(positions[key].is_lost for key in values):
            return None
        fixed = [key for key in positions if not positions[key].varies]
        alike = [
            index
            for index, group in enumerate(self._groups)
            if all(
                group.get(key) == values.get(key) for key in fixed if not positions[key].is_moving
            )
        ]
        same = [i for i in alike if all(self._groups[i].get(k) == values.get(k) for k in fixed)]
        if same:
            index = same[0]
            if index in self._merged:  # an earlier call of this step had other moving values
                self.confused = self._numbers.get((index, 0))
                self._unsure.add(index)
        elif len(alike) == 1 and alike[0] not in self._taken:
            index = alike[0]
            self._groups[index] = values
            self._merged.add(index)
            self._taken.add(index)
            return index
        elif len(alike) > 1 or any(i in self._merged for i in alike):
            # Several calls of a step differ in what moves alone, and it has moved.
            for earlier in self._merged.intersection(alike):
                self.confused = self._numbers.get((earlier, 0))
            self._unsure.update(alike)
            return None
        else:
            index = len(self._groups)
            self._groups.append(values)
        self._taken.add(index)
        return index

    def _position(self, key: Hashable, *, moves: bool) -> _Position:
        if key not in self._positions:
            name = key if isinstance(key, str) else str(key[0])  # type: ignore[index]
            self._positions[key] = _Position(_NO_PROMPT.search(name) is not None or moves, moves)
        return self._positions[key]


class _Position:
    """One place among the arguments, and the different values that it has had.

    Attributes:
        varies: Whether it had another value in each of three steps and never one that came back:
            then it belongs to the step (a control signal, say) and tells nothing of the branch.

    Args:
        may_vary: Whether that can be, judging by its name and what is there.
        moves: Whether it is taken to belong to the step from its first change on.
    """

    def __init__(self, may_vary: bool, moves: bool) -> None:
        self._may_vary = may_vary
        self._moves = moves
        self.varies = False
        self._values: list[list[_Value]] = []
        self._first_in: list[int] = []  # the step in which each came first
        self._new_in: set[int] = set()
        self._came_back = False

    @property
    def is_moving(self) -> bool:
        """Whether a new value of it is no new branch."""
        return self._moves and not self._came_back

    @property
    def is_lost(self) -> bool:
        """Whether what tells branches apart is another at every step, as a prompt that fades."""
        return self.varies and not self._may_vary

    def index(self, step: int, leaves: tuple[Any, ...]) -> int:
        """Which of the different values so far these leaves are."""
        if self.varies:
            return 0
        for index, value in enumerate(self._values):
            if len(value) == len(leaves) and all(
                x.is_of(leaf) for x, leaf in zip(value, leaves, strict=True)
            ):
                self._came_back |= step > self._first_in[index]
                return index
        self._values.append([_Value(leaf) for leaf in leaves])
        self._first_in.append(step)
        self._new_in.add(step)
        are_numbers = all(not isinstance(leaf, Tensor) or leaf.ndim < 2 for leaf in leaves)
        self._may_vary = self._may_vary or are_numbers
        self.varies = not self._came_back and len(self._new_in) >= 3
        return len(self._values) - 1


class _Value:
    """A value, told again as the same object or by its content, without keeping it alive."""

    def __init__(self, leaf: Any) -> None:
        self._plain = None if isinstance(leaf, Tensor) else leaf
        self._form = _form(leaf)
        self._digest = digest(leaf) if isinstance(leaf, Tensor) else None
        self._remember(leaf)

    def is_of(self, leaf: Any) -> bool:
        """Whether a leaf is this value; on an accelerator, reading another object is a wait."""
        if self._form != _form(leaf):
            return False
        if not isinstance(leaf, Tensor):
            return bool(self._plain == leaf)
        same_object = self._tensor is not None and self._tensor() is leaf
        # Where nothing counts writes, what is free to read is read.
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


def _form(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, leaf.device
    return type(leaf)


def _is_laid_out_as(leaf: Any, latents: Tensor | None) -> bool:
    """Whether a leaf is a map over the latents, such as a control at the same places."""
    if not isinstance(leaf, Tensor) or latents is None or min(leaf.ndim, latents.ndim) < 4:
        return False
    if leaf.ndim != latents.ndim or leaf.shape[0] != latents.shape[0]:
        return False
    return leaf.shape[2:] == latents.shape[2:]
