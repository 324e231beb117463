"""Chooses the steps to compute by dynamic programming over the resulting state errors.

Between two computed steps, the denoiser's outputs are replaced by combinations of the last computed
outputs. The effect of a segment j < t < l on the state at its end is

    r(j, l) = sum_{j < t < l} h[t, l] e_t

and its cost is the squared residual after the best combination of the last computed outputs:

    cost(h, i, j, l) = min_a || r(j, l) - a_0 e_j - a_1 e_i - a_2 e_h ||^2

summed over all samples. Costs follow from the inner products of the e_t, independent of the model
and of the size of its output. For a fixed number of computed steps, dynamic programming minimises
the sum of costs exactly; its state is the last two (or three) computed steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from ..calibration.curves import Calibration
from ..calibration.trajectory import Trajectories
from ..checks import check_count, check_number
from ..errors import InvalidArgumentError
from ..layers.layer import CacheLayer
from ..schedule.row import Row
from ..schedule.schedule import Schedule
from ._assemble import assemble

FloatArray = npt.NDArray[np.float64]
Aim = Literal["uncached", "converged"]
"""Which run a plan comes close to."""
MAX_LAG = 3
NOISE, EARLY_WEIGHT = 5e-5, 3.0
RIDGE = 1e-6  # ridge of the weight fit, relative to the mean square of the outputs
LARGEST_NORM = 12.0  # limit of the L1 norm of the weights of one reuse
_MAX_COSTS = 3_000_000  # size of the table of costs, which limits the length of segments


def plan_trajectory(
    calibration: Calibration,
    *,
    speedup: float | None = None,
    compute: float | None = None,
    steps_computed: int | None = None,
    max_lag: int = MAX_LAG,
    memory: int = 2,
    noise: float = NOISE,
    early_weight: float = EARLY_WEIGHT,
    target: Aim = "uncached",
) -> Schedule:
    """Plans from recorded trajectories which steps run the denoiser and how the others reuse it.

    The model does not run. The whole denoiser's output is reused, so a reused step has almost no
    cost and ``max_lag`` outputs are kept. The weights minimise the distance between combinations of
    *uncached* outputs and the uncached states; ``fit`` refines them in closed loop.

    Args:
        calibration: Calibration with trajectories, as ``calibrate`` records them.
        speedup: Ratio of all steps to computed steps. Exactly one of ``speedup``, ``compute`` and
            ``steps_computed`` is required.
        compute: Largest fraction of computed steps, in (0, 1].
        steps_computed: Exact number of computed steps.
        max_lag: Number of last computed outputs that a reuse combines.
        memory: Number of last computed steps in the state of the dynamic program, 2 or 3.
        noise: Expected mean squared deviation of the run's computed outputs from uncached outputs,
            relative to their mean square. Larger values favour choices with small weights.
        early_weight: Weight of an error in the first state relative to the last. Early errors
            propagate through later steps, by an amount that differs between models.

        target: States that the plan comes close to: those of the "uncached" run, or of the
            "converged" one, which ``calibrate(converged_steps=...)`` records. Fit with the same
            target.

    Returns:
        A schedule of granularity "model" with fitted weights.

    Raises:
        InvalidArgumentError: If the calibration has no trajectories, or an argument is invalid.

    Source: ours; arXiv 2602.22654 also chooses steps by dynamic programming.

    Example:
        >>> import torch
        >>> from smoothcache import calibrate
        >>> from diffusers import DiTTransformer2DModel
        >>> model = DiTTransformer2DModel(
        ...     num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=1,
        ...     sample_size=8,
        ... ).eval()
        >>> @torch.no_grad()
        ... def sample(i):
        ...     x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(i))
        ...     for t in range(8, 0, -1):
        ...         x = x - 0.1 * model(x, torch.tensor([t]), torch.tensor([1])).sample[:, :4]
        ...     return x
        >>> calibration = calibrate(model, sample, 3, trajectory=True, progress=False)
        >>> plan_trajectory(calibration, speedup=2).compute
        0.5
    """
    trajectories = trajectories_of(calibration)
    max_lag = check_count("max_lag", max_lag, least=1)
    if memory not in (2, 3):
        raise InvalidArgumentError(f"memory must be 2 or 3, got {memory!r}.")
    if check_number("early_weight", early_weight) <= 0:
        raise InvalidArgumentError(f"early_weight must be positive, got {early_weight:g}.")
    if check_number("noise", noise) < 0:
        raise InvalidArgumentError(f"noise must not be negative, got {noise:g}.")
    count = steps_to_compute(trajectories, speedup, compute, steps_computed)
    if target not in get_args(Aim):
        raise InvalidArgumentError(f"target must be 'uncached' or 'converged', got {target!r}.")
    segments = Segments.of(trajectories, early_weight, target)
    chosen, cost = choose_steps(segments, count, memory=memory, noise=noise)
    steps = trajectories.num_steps
    computed = tuple(step in chosen for step in range(steps))
    weights = open_loop_weights(segments, chosen, max_lag)
    settings = {
        "planner": "trajectory",
        "steps_computed": count,
        "max_lag": max_lag,
        "memory": memory,
        "noise": f"{noise:g}",
        "early_weight": f"{early_weight:g}",
        "target": target,
        "weights": "open loop",
        "expected_state_error": f"{relative_error(segments, cost):.3g}",
    }
    return whole_model_schedule(calibration, computed, weights, settings)


def trajectories_of(calibration: Calibration) -> Trajectories:
    """Returns the trajectories of a calibration.

    Raises:
        InvalidArgumentError: If it has none.
    """
    if not isinstance(calibration, Calibration):
        raise InvalidArgumentError(
            f"expected a Calibration, got {type(calibration).__name__}; calibrate the model first"
        )
    if calibration.trajectories is None:
        why = calibration.provenance.get("no_trajectories", "")
        raise InvalidArgumentError(
            "the calibration has no trajectories, which planning requires"
            + (f" ({why})" if why else "")
            + "; calibrate with trajectory=True."
        )
    return calibration.trajectories


def steps_to_compute(
    trajectories: Trajectories,
    speedup: float | None,
    compute: float | None,
    steps_computed: int | None,
) -> int:
    """Returns the number of computed steps within a budget.

    Raises:
        InvalidArgumentError: If not exactly one budget is given, or it is invalid.
    """
    given = [x for x in (speedup, compute, steps_computed) if x is not None]
    if len(given) != 1:
        raise InvalidArgumentError("pass exactly one of speedup, compute and steps_computed.")
    steps, least = trajectories.num_steps, len(trajectories.first_steps())
    if steps_computed is not None:
        count = check_count("steps_computed", steps_computed, least=1)
    elif compute is not None:
        fraction = check_number("compute", compute)
        if not 0 < fraction <= 1:
            raise InvalidArgumentError(f"compute must be in (0, 1], got {fraction:g}.")
        count = int(steps * fraction + 1e-9)
    else:
        factor = check_number("speedup", speedup)
        if factor < 1:
            raise InvalidArgumentError(f"speedup must be at least 1, got {factor:g}.")
        count = int(steps / factor + 1e-9)
    if not least <= count <= steps:
        raise InvalidArgumentError(
            f"the budget allows computing {count} of {steps} steps, expected {least} to {steps}."
        )
    return count


def whole_model_schedule(
    calibration: Calibration,
    computed: Sequence[bool],
    weights: Sequence[Sequence[float]],
    settings: dict[str, object],
    branch_weights: Sequence[Sequence[Sequence[float]]] = (),
) -> Schedule:
    """Returns a schedule that reuses the whole denoiser's output with these weights.

    Args:
        calibration: Calibration with trajectories.
        computed: Whether each step is computed.
        weights: Weights of the last computed outputs at every step, the newest first; empty at
            computed steps.
        settings: Settings for the provenance.
        branch_weights: Weights of further guidance branches, if branches have separate weights.
    """
    trajectories = trajectories_of(calibration)
    names = tuple(dict.fromkeys(trajectories.denoisers))
    steps = trajectories.num_steps
    layers, rows = [], {}
    errors = np.full((1, len(names), 1, steps), np.nan)
    for number, name in enumerate(names):
        run = [t for t in range(steps) if trajectories.denoisers[t] == name]
        errors[0, number, 0, run[1:]] = 0.0
        layers.append(
            CacheLayer(
                name,
                kind="model",
                block=name,
                macs=calibration.total_macs or None,
                nbytes=trajectories.output_bytes or None,
            )
        )
        runs = [trajectories.denoisers[t] == name for t in range(steps)]
        flags = tuple(x or not is_run for x, is_run in zip(computed, runs, strict=True))
        tables = [
            tuple(tuple(w) if not flag else () for w, flag in zip(table, flags, strict=True))
            for table in (weights, *branch_weights)
        ]
        parts = trajectories.responses.guidance.parts if branch_weights else 1
        if all(flags):
            rows[name] = Row(flags)
        else:
            rows[name] = Row(
                flags,
                "fitted",
                weights=tables[0],
                branch_weights=tuple(tables[1:]),
                batch_parts=parts,
            )
    whole = replace(
        calibration, layers=tuple(layers), errors=errors, trajectories=None, tokens=None
    )
    return assemble(whole, rows, settings)


class Segments:
    """Effects of all segments between computed steps, as inner products.

    Args:
        gram: Inner products of the outputs, summed over the samples, [steps, steps].
        table: Responses of the solver, [steps, steps + 1].
        ends: For each step, the next step of another denoiser, or the number of steps; [steps].
        sensitivities: Weight of an error in the latents at each step and at the end, [steps + 1];
            None for equal weights.
        offsets: Inner products of the outputs, then the offsets of the converged latents, with
            themselves, [2 * steps + 1, 2 * steps + 1]; None to stay close to the uncached states.

    Attributes:
        corrections: Inner products with the outputs of what a segment has to add to come from one
            converged state to the next, [begin, end, steps]; None without offsets.
    """

    def __init__(
        self,
        gram: FloatArray,
        table: FloatArray,
        ends: Sequence[int],
        sensitivities: FloatArray | None = None,
        offsets: FloatArray | None = None,
    ) -> None:
        self.gram, self.table = gram, table
        self.ends = np.array(ends)
        self.num_steps = steps = len(gram)
        t, later = np.arange(steps), np.arange(steps + 1)
        inside = (t[:, None, None] < t) & (t < later[:, None])  # [j, l, t]
        effects = np.where(inside, table.T[None], 0.0)
        if sensitivities is not None:
            effects = effects * sensitivities[:, None]
        self.effects: FloatArray = effects  # [j, l, t]
        self.products: FloatArray = effects @ gram  # <r(j, l), e_t>
        self.squares: FloatArray = np.einsum("jlt,jlt->jl", self.products, effects)
        self.corrections: FloatArray | None = None
        if offsets is not None:
            wanted = _wanted_offsets(table)  # [j, l, t]
            self.corrections = wanted @ offsets[steps:, :steps]
            if sensitivities is not None:
                wanted = wanted * sensitivities[:, None]
            both = np.concatenate([effects, wanted], axis=-1)
            products = both @ offsets
            self.squares = np.einsum("jlt,jlt->jl", products, both)
            self.products = products[..., :steps].copy()
            self.products[t, t + 1] = 0.0  # without a reused step there are no weights

    @classmethod
    def of(
        cls, trajectories: Trajectories, early_weight: float = 1.0, target: Aim = "uncached"
    ) -> Segments:
        """Returns the segments of all samples, with errors weighted as in ``plan_trajectory``."""
        steps = trajectories.num_steps
        firsts = [*trajectories.first_steps(), steps]
        ends = [next(x for x in firsts if x > t) for t in range(steps)]
        sensitivities = early_weight ** np.linspace(1, 0, steps + 1)
        gram = trajectories.grams.sum(axis=0)
        offsets = None if target == "uncached" else _offset_products(trajectories, gram)
        return cls(gram, trajectories.responses.table, ends, sensitivities, offsets)

    def regressors(self, computed: Sequence[int], max_lag: int) -> list[int]:
        """Returns the last computed steps of the same denoiser, the newest first."""
        newest = computed[-1]
        return [t for t in reversed(computed[-max_lag:]) if self.ends[t] == self.ends[newest]]


def _wanted_offsets(table: FloatArray) -> FloatArray:
    """Returns how much of each offset a segment has to add, [begin, end, steps + 1].

    The offset at its end, less the offset at its beginning as the solver carries it on. A
    first-order solver carries a change of the latents on in proportion to the response of an
    earlier output; for others this is an approximation.
    """
    steps = len(table)
    wanted = np.zeros((steps, steps + 1, steps + 1))
    for begin in range(steps):
        later = np.arange(begin + 1, steps + 1)
        wanted[begin, later, later] += 1.0
        if begin:
            own = table[begin - 1, begin]
            carried = table[begin - 1, later] / own if own else np.ones(len(later))
            wanted[begin, later, begin] -= carried
    return wanted


def _offset_products(trajectories: Trajectories, gram: FloatArray) -> FloatArray:
    """Returns the inner products of outputs and offsets, [2 * steps + 1, 2 * steps + 1]."""
    if not trajectories.offsets:
        raise InvalidArgumentError(
            "the calibration has no converged trajectories; calibrate with converged_steps=..., "
            'or plan with target="uncached".'
        )
    steps = trajectories.num_steps
    products = np.zeros((2 * steps + 1, 2 * steps + 1))
    for pair in zip(trajectories.outputs, trajectories.offsets, strict=True):
        flat = np.concatenate([x.flatten(1).double().numpy() for x in pair])
        products += flat @ flat.T
    products[:steps, :steps] = gram
    return products


def relative_error(segments: Segments, cost: float) -> float:
    """Returns the root of a sum of costs, relative to the effect of all outputs on the end."""
    last = segments.table[:, -1]
    whole = float(last @ segments.gram @ last)
    return float(np.sqrt(cost / whole)) if whole > 0 else 0.0


def choose_steps(
    segments: Segments, count: int, *, memory: int = 2, noise: float = RIDGE
) -> tuple[list[int], float]:
    """Returns the computed steps with the smallest sum of costs, and that sum.

    Args:
        segments: Segments of the trajectories.
        count: Number of computed steps.
        memory: Number of last computed steps that the cost of a segment depends on, 2 or 3.
        noise: Relative noise of computed outputs; larger values keep weights small.

    Raises:
        InvalidArgumentError: If no such choice exists.
    """
    steps = segments.num_steps
    reach = _reach(steps, count, memory)
    costs = _costs(segments, reach, memory, noise)  # [steps, older..., gap - 1]
    states = (steps, *(reach + 1 for _ in range(memory - 1)))
    value = np.full(states, np.inf)
    value[(0,) * memory] = 0.0
    choices = []
    for _ in range(count - 1):
        following, choice = np.full(states, np.inf), np.zeros(states, dtype=np.int16)
        for j in range(steps - 1):
            if not np.isfinite(value[j]).any():
                continue
            total = value[j][..., None] + costs[j]  # the oldest step is the second-to-last axis
            best = total.argmin(axis=-2)
            least = np.take_along_axis(total, best[..., None, :], axis=-2)[..., 0, :]
            gaps = np.arange(1, min(reach, steps - 1 - j) + 1)
            # The new gap comes first in the new state; the previously newest gap comes second.
            following[j + gaps, gaps] = np.moveaxis(least, -1, 0)[gaps - 1]
            choice[j + gaps, gaps] = np.moveaxis(best, -1, 0)[gaps - 1]
        choices.append(choice)
        value = following
    last = np.full(states, np.inf)
    for j in range(max(0, steps - reach), steps):
        last[j] = value[j] + costs[j][..., steps - j - 1]
    at = np.unravel_index(int(last.argmin()), states)
    if not np.isfinite(last[at]):
        raise InvalidArgumentError(f"there is no choice of {count} out of {steps} steps.")
    return _traced(tuple(int(x) for x in at), choices), float(last[at])


def _traced(state: tuple[int, ...], choices: list[npt.NDArray[np.int16]]) -> list[int]:
    """Returns the computed steps that lead to a state (step, gap before it, ...)."""
    chosen = [state[0]]
    for choice in reversed(choices):
        step, gap, *older = state
        state = (step - gap, *older, int(choice[state]))
        chosen.append(state[0])
    return chosen[::-1]


def _reach(steps: int, count: int, memory: int) -> int:
    """Returns the largest gap between computed steps that is considered."""
    most = int((_MAX_COSTS / steps) ** (1 / memory))
    return min(steps, max(most, -(-steps // count)))


def _costs(segments: Segments, reach: int, memory: int, noise: float) -> FloatArray:
    """Returns costs by newest computed step, gaps to older steps (0 for none), and next gap."""
    steps = segments.num_steps
    costs = np.full((steps, *(reach + 1 for _ in range(memory - 1)), reach), np.inf)
    for j in range(steps):
        longest = min(reach, int(segments.ends[j]) - j)
        nexts = np.arange(j + 1, j + longest + 1)
        older, is_usable, is_valid = _older(segments, j, reach, memory)
        at = np.stack([np.full(is_valid.shape, j), *older], axis=-1)  # the newest first
        usable = np.stack([np.ones(is_valid.shape, dtype=bool), *is_usable], axis=-1)
        both = usable[..., :, None] & usable[..., None, :]
        matrix = np.where(both, segments.gram[at[..., :, None], at[..., None, :]], 0.0)
        matrix = matrix + _ridge(matrix, usable, noise) + np.eye(memory) * ~usable[..., None]
        right = segments.products[j][nexts[:, None], at[..., None, :]] * usable[..., None, :]
        solved = np.linalg.solve(matrix[..., None, :, :], right[..., None])[..., 0]
        explained = (right * solved).sum(axis=-1)
        cost = np.maximum(segments.squares[j, nexts] - explained, 0.0)
        costs[j][..., :longest] = np.where(is_valid[..., None], cost, np.inf)
    return costs


def _older(
    segments: Segments, j: int, reach: int, memory: int
) -> tuple[list[npt.NDArray[np.int64]], list[npt.NDArray[np.bool_]], npt.NDArray[np.bool_]]:
    """Returns the steps before j for all gaps, whether each is usable, and which gaps are valid."""
    gaps = np.arange(reach + 1)
    shape = (reach + 1,) * (memory - 1)
    position, exists = np.full(shape, j), np.ones(shape, dtype=bool)
    older, is_usable = [], []
    for axis in range(memory - 1):
        gap = np.broadcast_to(
            gaps.reshape([-1 if a == axis else 1 for a in range(memory - 1)]), shape
        )
        is_first = position == 0  # nothing is computed before step 0
        exists = exists & ((gap == 0) == is_first) & (position - gap >= 0)
        position = np.maximum(position - gap, 0)
        older.append(position)
        is_usable.append((gap > 0) & (segments.ends[position] == segments.ends[j]))
    return older, is_usable, exists


def _ridge(matrix: FloatArray, usable: npt.NDArray[np.bool_], noise: float) -> FloatArray:
    mean = np.trace(matrix, axis1=-2, axis2=-1) / usable.sum(axis=-1)
    ridge: FloatArray = max(noise, 1e-12) * mean[..., None, None] * np.eye(matrix.shape[-1])
    return ridge


def open_loop_weights(
    segments: Segments, computed: Sequence[int], max_lag: int
) -> tuple[tuple[float, ...], ...]:
    """Returns the weights of uncached outputs at every step, the newest first.

    The weights of each step are fitted to its own output; computed steps have none. As least
    squares is linear, their sum also minimises the error of the state at the end of the segment.
    """
    steps = segments.num_steps
    weights: list[tuple[float, ...]] = [()] * steps
    for number, (j, end) in enumerate(zip(computed, [*computed[1:], steps], strict=True)):
        if end > j + 1:
            known = segments.regressors(computed[: number + 1], max_lag)
            found = guarded_weights(segments, known, range(j + 1, end))
            found = _corrected(segments, known, j, end, found)
            weights[j + 1 : end] = [tuple(x) for x in found.tolist()]
    return tuple(weights)


def _corrected(
    segments: Segments, known: Sequence[int], begin: int, end: int, weights: FloatArray
) -> FloatArray:
    """Returns weights that also bring a segment from one converged state to the next."""
    if segments.corrections is None:
        return weights
    used = list(known[: weights.shape[1]])
    responses = segments.table[begin + 1 : end, end]
    size = float(responses @ responses)
    if size == 0:
        return weights
    matrix = segments.gram[np.ix_(used, used)]
    ridge = RIDGE * np.trace(matrix) / len(used) * np.eye(len(used))
    added = np.linalg.lstsq(matrix + ridge, segments.corrections[begin, end, used], rcond=None)[0]
    corrected: FloatArray = weights + (responses / size)[:, None] * added
    return corrected if np.abs(corrected).sum(axis=1).max() <= LARGEST_NORM else weights


def guarded_weights(segments: Segments, known: Sequence[int], reused: range) -> FloatArray:
    """Returns least-squares weights [reused, lags], with fewer lags if they would be too large."""
    for lags in range(len(known), 0, -1):
        used = list(known[:lags])
        matrix = segments.gram[np.ix_(used, used)]
        ridge = RIDGE * np.trace(matrix) / lags
        right = segments.gram[np.ix_(used, list(reused))]
        found: FloatArray = np.linalg.lstsq(matrix + ridge * np.eye(lags), right, rcond=None)[0].T
        if np.abs(found).sum(axis=1).max() <= LARGEST_NORM:
            return found
    return np.ones((len(reused), 1))  # the predictor "hold"
