"""Which of a step's calls is this one? Found again by its name, or by what it is conditioned on.

Guidance calls the denoiser several times in a step, with and without the prompt, and may do so in
some steps only. The values of one such *branch* must never be reused in another. A branch is told
by the name that ``cache_context`` gives it, else by its conditioning: all that the denoiser is
given but the timestep and the latents. Several calls that this cannot tell apart (the two stages
of a Heun step) are taken in their order.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

# Elements of a tensor that are compared, evenly spaced, unless it is the very same object.
_COMPARED = 65_536


class Branches:
    """Numbers the calls of a denoiser so that a branch has the same number in every step."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Makes the next call the first one of a new generation."""
        self._positions: list[_Position] = []
        self._groups: list[tuple[int, ...]] = []
        self._numbers: dict[tuple[Hashable, int], int] = {}
        self._uses: dict[Hashable, int] = {}
        self._step = -1

    def number(self, step: int, conditioning: Sequence[Any], name: str | None) -> int:
        """The branch of a call.

        Args:
            step: Index of the solver step.
            conditioning: What the call is given besides timestep and latents, flattened.
            name: What ``cache_context`` calls it; None outside of one.
        """
        if step != self._step:
            self._step, self._uses = step, {}
        group: Hashable = self._group(step, conditioning) if name is None else name
        use = self._uses[group] = self._uses.get(group, -1) + 1
        return self._numbers.setdefault((group, use), len(self._numbers))

    def _group(self, step: int, conditioning: Sequence[Any]) -> int:
        """Index of the earlier calls that were conditioned in the same way."""
        missing = len(conditioning) - len(self._positions)
        self._positions += [_Position() for _ in range(missing)]
        values = tuple(
            position.index(step, leaf)
            for position, leaf in zip(self._positions, conditioning, strict=False)
        )
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
            then it belongs to the step (a second latent, say) and tells nothing of the branch.
    """

    def __init__(self) -> None:
        self.varies = False
        self._values: list[_Value] = []
        self._new_in: set[int] = set()
        self._came_back = False

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
        self.varies = not self._came_back and len(self._new_in) >= 3
        return len(self._values) - 1


class _Value:
    """A value, told again as the same object or by its content, without keeping it alive."""

    def __init__(self, leaf: Any, step: int) -> None:
        self.step = step
        self._plain = None if isinstance(leaf, Tensor) else leaf
        self._form = _form(leaf)
        self._digest = _digest(leaf) if isinstance(leaf, Tensor) else None
        self._remember(leaf)

    def is_of(self, leaf: Any) -> bool:
        """Whether a leaf is this value; on an accelerator, reading another object is a wait."""
        if self._form != _form(leaf):
            return False
        if not isinstance(leaf, Tensor):
            return bool(self._plain == leaf)
        same_object = self._tensor is not None and self._tensor() is leaf
        if same_object and _is_known_unwritten(leaf, self._version):
            return True
        digest = _digest(leaf)
        if digest is None or self._digest is None:
            return False
        if isinstance(digest, Tensor) and isinstance(self._digest, Tensor):
            is_same = bool((digest == self._digest).all())
        else:
            is_same = bool(digest == self._digest)
        if is_same:
            self._remember(leaf)
        return is_same

    def _remember(self, leaf: Any) -> None:
        self._tensor = weakref.ref(leaf) if isinstance(leaf, Tensor) else None
        self._version = _version(leaf) if isinstance(leaf, Tensor) else None


def _form(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, leaf.device
    return type(leaf)


def _version(tensor: Tensor) -> int | None:
    """Counts writes; nothing does in inference mode."""
    return None if tensor.is_inference() else tensor._version


def _is_known_unwritten(tensor: Tensor, version: int | None) -> bool:
    """Whether an object is as it was; where nothing counts writes, what is free to read is read."""
    counts_writes = version is not None or tensor.device.type != "cpu"
    return counts_writes and version == _version(tensor)


def _digest(tensor: Tensor) -> Tensor | int | None:
    """A number or a few over a tensor's content, where it lies; None where there is nothing."""
    if tensor.device.type == "meta" or tensor.layout is not torch.strided:
        return None
    values = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    values = values.detach().reshape(-1)
    values = values[:: max(1, values.numel() // _COMPARED)].contiguous()
    if values.device.type == "cpu":
        return hash(values.view(torch.uint8).numpy().tobytes())
    values = values.to(torch.float32 if values.device.type == "mps" else torch.float64)
    values = values.nan_to_num()
    ramp = torch.arange(1, len(values) + 1, device=values.device, dtype=values.dtype)
    return torch.stack([values.sum(), values.square().sum(), values @ ramp / max(1, len(values))])
