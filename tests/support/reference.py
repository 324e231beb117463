"""What a run under a schedule should do, worked out another way than the library does it.

``sample`` is a sampler that says which step and call comes; ``ByHand`` runs a toy under a schedule
by replacing forwards and keeping every output; ``Liveness`` says what has to be kept when.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from support.toys import CLASSES, TOKENS, WIDTH, Toy
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from smoothcache import PREDICTORS, Run, Schedule

STEPS = 8


def levels(num_steps: int = STEPS) -> tuple[float, ...]:
    """Noise levels for predictors that run over them, not evenly spaced."""
    return tuple(1 - ((i + 0.5) / num_steps) ** 1.5 for i in range(num_steps))


def times(num_steps: int = STEPS) -> list[float]:
    return [1000 * (1 - i / num_steps) for i in range(num_steps)]


def sample(
    toy: Toy,
    num_steps: int = STEPS,
    *,
    seed: int = 0,
    batch: int = 1,
    tokens: int = TOKENS,
    calls: int | Callable[[int], int] = 1,
    timesteps: Sequence[float] | None = None,
    give: Callable[[Tensor], Tensor] = lambda x: x,
    begin: Callable[[int, int], None] = lambda step, branch: None,
    after: Callable[[int], None] = lambda step: None,
) -> list[Tensor]:
    """The latents after every step.

    Args:
        calls: Calls of the model in each step, each for another class.
        give: Makes what a call gets of the latents.
        begin: Told of every call before it comes.
        after: Told of every step when it is over.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, tokens, WIDTH, generator=generator)
    y = torch.full((batch,), seed % CLASSES)
    trajectory = []
    for step, time in enumerate(timesteps or times(num_steps)):
        outputs = []
        for branch in range(calls(step) if callable(calls) else calls):
            begin(step, branch)
            t = torch.full((batch,), float(time))
            outputs.append(toy.denoise(give(x), t, (y + branch) % CLASSES))
        x = x - sum(outputs) / (num_steps * len(outputs))
        trajectory.append(x)
        after(step)
    return trajectory


def same(a: Any, b: Any) -> bool:
    """Whether two results are bit for bit the same."""
    a, b = pytree.tree_leaves(a), pytree.tree_leaves(b)
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


class ByHand:
    """A copy of a toy under a schedule of layers, blocks and models, told its steps by the test.

    Call ``begin`` before each call of the model.

    Attributes:
        toy: The copy.
        outputs: What has been computed, by path, branch and use in the call: step, leaves, form.
        computed: Layer calls that ran as planned.
        reused: Layer calls answered with a held output.
        recomputed: Layer calls that had nothing to reuse from the last step that was to compute.
    """

    def __init__(self, toy: Toy, schedule: Schedule) -> None:
        self.toy = copy.deepcopy(toy)
        self.outputs: dict[tuple[str, int, int], list[tuple[int, list[Any], Any]]] = {}
        self.computed = self.reused = self.recomputed = 0
        self._schedule = schedule
        for layer in schedule.layers or ():
            module = self.toy.get_submodule(layer.path)
            module.forward = self._replacement(layer.path, layer.kind, module.forward)

    def begin(self, step: int, branch: int) -> None:
        self._step, self._branch = step, branch
        self._uses: dict[str, int] = {}

    def _replacement(self, path: str, kind: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        row = self._schedule.rows[path]
        order = PREDICTORS[row.predictor].order
        places = places_of(row.predictor, self._schedule)
        continues = kind.endswith("block") or (kind != "model" and self.toy.adds_inside)

        def replacement(*args: Any, **kwargs: Any) -> Any:
            use = self._uses[path] = self._uses.get(path, -1) + 1
            history = self.outputs.setdefault((path, self._branch, use), [])
            streams = [x.clone() for x in pytree.tree_leaves((args, kwargs)) if _is_stream(x)]
            due = max(step for step in range(self._step + 1) if row.computed[step])
            if row.computed[self._step] or not history or history[-1][0] < due:
                self.computed += row.computed[self._step]
                self.recomputed += not row.computed[self._step]
                output = forward(*args, **kwargs)
                leaves, spec = pytree.tree_flatten(output)
                kept = [leaf.clone() - _base(leaf, streams, continues) for leaf in leaves]
                history.append((self._step, kept, spec))
                return output
            self.reused += 1
            known = history[-order - 1 :]
            weights = polynomial_weights([places[s] for s, _, _ in known], places[self._step])
            values = [
                sum(weight * leaf for weight, leaf in zip(weights, leaves, strict=True))
                for leaves in zip(*(leaves for _, leaves, _ in known), strict=True)
            ]
            leaves = [value + _base(value, streams, continues) for value in values]
            return pytree.tree_unflatten(leaves, known[-1][2])

        return replacement


def _is_stream(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _base(leaf: Any, streams: Sequence[Tensor], continues: bool) -> Any:
    """What a leaf continues, if the layer's output continues its inputs."""
    return next(x for x in streams if x.shape == leaf.shape) if continues else 0


def run_by_hand(toy: Toy, schedule: Schedule, **options: Any) -> tuple[list[Tensor], ByHand]:
    """The latents after every step of ``sample``, and what made them."""
    by_hand = ByHand(toy, schedule)
    return sample(by_hand.toy, begin=by_hand.begin, **options), by_hand


def places_of(predictor: str, schedule: Schedule) -> list[float]:
    """Where each step lies on the axis of a predictor."""
    if PREDICTORS[predictor].axis == "step":
        return [float(step) for step in range(schedule.num_steps)]
    noise = np.array(schedule.noise_levels)
    ratio = (1 - noise) / noise
    on_axis = {"log_snr": np.log(ratio**2), "angle": np.arctan(1 / ratio)}
    return list(on_axis[PREDICTORS[predictor].axis])


def polynomial_weights(steps: Sequence[float], at: float) -> list[float]:
    """Weights w with sum w_i p(steps_i) = p(at) for every polynomial p of the right degree."""
    powers = np.vander(np.array(steps, dtype=np.float64), increasing=True).T
    weights = np.linalg.solve(powers, np.array([float(at) ** k for k in range(len(steps))]))
    return [1.0] if len(steps) == 1 else [float(w) for w in weights]


@contextmanager
def watched_layers(toy: nn.Module, schedule: Schedule) -> Iterator[list[tuple[str, int]]]:
    """Path and bytes of the output of every layer, as they are called."""
    seen: list[tuple[str, int]] = []
    replaced = []
    for layer in schedule.layers or ():
        module = toy.get_submodule(layer.path)
        forward = module.forward

        def watching(*args: Any, path: str = layer.path, inner: Any = forward, **kw: Any) -> Any:
            output = inner(*args, **kw)
            tensors = [x for x in pytree.tree_leaves(output) if isinstance(x, Tensor)]
            seen.append((path, sum(x.nbytes for x in tensors)))
            return output

        replaced.append((module, module.__dict__.get("forward")))
        module.forward = watching
    try:
        yield seen
    finally:
        for module, forward in replaced:
            if forward is None:
                del module.__dict__["forward"]
            else:
                module.forward = forward


class Liveness:
    """Bytes that a run has to hold, from the uses that still lie ahead of every value.

    Attributes:
        after_step: Bytes held when a step is over; [steps].
        peak: The most bytes held just after a value has been kept.
    """

    def __init__(self, calls: Sequence[Sequence[tuple[str, int]]], schedule: Schedule) -> None:
        """``calls[step]`` lists path and bytes of each layer call of a step, in order."""
        events: list[tuple[int, tuple[str, int], bool, int]] = []  # step, place, computed, bytes
        for step, layer_calls in enumerate(calls):
            uses: dict[str, int] = {}
            for path, size in layer_calls:
                uses[path] = uses.get(path, -1) + 1
                events.append((step, (path, uses[path]), self._is_due(schedule, path, step), size))
        deaths = [self._death(events, i, schedule) for i in range(len(events))]

        def held(after: int) -> int:
            return sum(events[i][3] for i in range(after + 1) if events[i][2] and deaths[i] > after)

        last_of_step = [
            max(i for i, event in enumerate(events) if event[0] == step)
            for step in range(len(calls))
        ]
        self.after_step = [held(i) for i in last_of_step]
        self.peak = max((held(i) for i, event in enumerate(events) if event[2]), default=0)

    @staticmethod
    def _is_due(schedule: Schedule, path: str, step: int) -> bool:
        return schedule.rows[path].computed[step]

    @staticmethod
    def _death(events: Sequence[Any], i: int, schedule: Schedule) -> int:
        """Index of the last event that reads the value of event i."""
        _, place, _, _ = events[i]
        order = PREDICTORS[schedule.rows[place[0]].predictor].order
        newer, death = 0, i
        for j in range(i + 1, len(events)):
            if events[j][1] != place:
                continue
            newer += events[j][2]
            if newer > order:
                break
            if not events[j][2]:
                death = j
        return death


def remembered(run: Run) -> set[int]:
    """Identities of the tensors that tell generations and windows apart: short sketches of latents.

    They are no kept values, and their number does not grow.
    """
    attachment = run._attachment
    assert attachment is not None
    todo: list[Any] = [attachment.clock, attachment.turn, *attachment.branches.values()]
    seen: dict[int, Any] = {}
    while todo:
        one = todo.pop()
        ours = type(one).__module__.startswith(("smoothcache.tracking", "weakref"))
        if id(one) in seen or not (ours or isinstance(one, Tensor | dict | list | tuple)):
            continue
        seen[id(one)] = one
        todo += [] if isinstance(one, Tensor) else gc.get_referents(one)
    tensors = {key: one for key, one in seen.items() if type(one) is Tensor}
    assert len(tensors) < 20
    return set(tensors)
