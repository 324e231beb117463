"""Which of a step's calls is this one? Found again by its name, or by what it is conditioned on.

Guidance calls the denoiser several times in a step, with and without the prompt, and may do so in
some steps only. The values of one such *branch* must never be reused in another. A branch is told
by the name that ``cache_context`` gives it, else by its conditioning: all that the denoiser is
given but the timestep and the latents.

Several calls that this cannot tell apart are the stages of a solver's step (Heun's, say) if their
latents differ, and are taken in their order. If their latents are the same too, what differs is
hidden, as in guidance by a perturbed model: such calls are told no branch.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ._content import are_equal, digest, version

# What may change at every step without being another prompt.
_NO_PROMPT = re.compile(
    r"control|residual|ref|mask|ids|noise|scale|guidance|step|image|video|audio"
)
_MOST_USES = 4


class Branches:
    """Numbers the calls of a denoiser so that a branch has the same number in every step.

    Attributes:
        mistaken: The branch that an earlier call of the step was given, if the last call was the
            first in this generation that nothing tells from such a one; either may be the other.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Makes the next call the first one of a new generation."""
        self._positions: list[_Position] = []
        self._groups: list[tuple[int, ...]] = []
        self._numbers: dict[tuple[Hashable, int], int] = {}
        self._uses: dict[Hashable, int] = {}
        self._counts: dict[Hashable, list[int]] = {}  # calls in each step, where nobody says
        self._latents: dict[Hashable, list[tuple[_Value | None, int]]] = {}
        self._unsure: set[Hashable] = set()
        self._step = -1
        self.mistaken: int | None = None

    def number(
        self,
        step: int,
        conditioning: Mapping[str, Sequence[Any]],
        name: str | None,
        latents: Tensor | None = None,
        *,
        stages: int | None = None,
        position: int | None = None,
    ) -> int | None:
        """The branch of a call; None if it cannot be told.

        Args:
            step: Index of the solver step.
            conditioning: What the call is given besides timestep and latents, flattened, by the
                name of the argument.
            name: What ``cache_context`` calls it; None outside of one.
            latents: What is denoised.
            stages: How often the solver asks in this step for each branch, if it says.
            position: Where the solver is, if it counts; no two of its stages are at the same.
        """
        if step != self._step:
            self._begin(step)
        group = self._group(step, conditioning) if name is None else name
        self.mistaken = None
        if group is None:
            return None
        use = self._uses[group] = self._uses.get(group, -1) + 1
        alike = self._use_with(latents, group, position)
        if alike is not None and group not in self._unsure:
            self.mistaken = self._numbers.get((group, alike))
        if alike is not None or (stages is not None and use >= stages):
            self._unsure.add(group)
        if stages is not None:
            self._counts.pop(group, None)
        elif use == 0:
            self._counts.setdefault(group, []).append(1)
        elif group in self._counts:
            self._counts[group][-1] += 1
        if group in self._unsure or use >= _MOST_USES:
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

    def _use_with(
        self, latents: Tensor | None, group: Hashable, position: int | None
    ) -> int | None:
        """The earlier call of the group in this step that nothing tells from this one."""
        earlier = self._latents.setdefault((group, position), [])
        for value, use in earlier:
            if value is None or latents is None or value.is_of(latents):
                return use
        value = None if latents is None else _Value(latents, self._step)
        earlier.append((value, self._uses[group]))
        return None

    def _group(self, step: int, conditioning: Mapping[str, Sequence[Any]]) -> Hashable:
        """Index of the earlier calls that were conditioned in the same way; None if in none."""
        leaves = [(name, leaf) for name, values in conditioning.items() for leaf in values]
        for name, _ in leaves[len(self._positions) :]:
            self._positions.append(_Position(may_vary=_NO_PROMPT.search(name) is not None))
        values = tuple(
            position.index(step, leaf)
            for position, (_, leaf) in zip(self._positions, leaves, strict=False)
        )
        if any(position.is_lost for position in self._positions[: len(leaves)]):
            return None
        for index, group in enumerate(self._groups):
            if len(group) == len(values) and all(
                a == b or position.varies
                for a, b, position in zip(group, values, self._positions, strict=False)
            ):
                return index
        self._groups.append(values)
        return len(self._groups) - 1


class _Position:
    """One place among the arguments, and the different values that it has had.

    Attributes:
        varies: Whether it had another value in each of three steps and never one that came back:
            then it belongs to the step (a control signal, say) and tells nothing of the branch.

    Args:
        may_vary: Whether that can be, judging by its name and what is there.
    """

    def __init__(self, may_vary: bool) -> None:
        self._may_vary = may_vary
        self.varies = False
        self._values: list[_Value] = []
        self._new_in: set[int] = set()
        self._came_back = False

    @property
    def is_lost(self) -> bool:
        """Whether what tells branches apart is another at every step, as a prompt that fades."""
        return self.varies and not self._may_vary

    def index(self, step: int, leaf: Any) -> int:
        """Which of the different values so far a leaf is."""
        if self.varies:
            return 0
        for index, value in enumerate(self._values):
            if value.is_of(leaf):
                self._came_back |= step > value.step
                return index
        self._values.append(_Value(leaf, step))
        self._new_in.add(step)
        is_number = not isinstance(leaf, Tensor) or leaf.ndim < 2
        self._may_vary = self._may_vary or is_number
        self.varies = not self._came_back and len(self._new_in) >= 3
        return len(self._values) - 1


class _Value:
    """A value, told again as the same object or by its content, without keeping it alive."""

    def __init__(self, leaf: Any, step: int) -> None:
        self.step = step
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
