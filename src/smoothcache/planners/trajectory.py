"""Chooses the steps to compute by the states that reuse leads to: dynamic programming.

Between two computed steps the denoiser's outputs are replaced by combinations of the last computed
ones. What counts of that is one vector a segment, what its reused outputs do to the state at which
the next segment begins:

    r(j, l) = sum_{j < t < l} h[t, l] e_t

and what it costs is what no combination of the last computed outputs can express of it:

    cost(h, i, j, l) = min_a || r(j, l) - a_0 e_j - a_1 e_i - a_2 e_h ||^2

over all samples together. It follows from the inner products of the e_t, so neither the model nor
the size of its output matters. With the number of computed steps fixed, dynamic programming
minimises the sum of costs exactly; its state is the last two (or three) computed steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

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
MAX_LAG = 3
NOISE, EARLY_WEIGHT = 5e-5, 3.0
RIDGE = 1e-6  # of the mean square of what is combined, where weights are fitted
LARGEST_NORM = 12.0  # of the weights of one reuse, as the sum of their absolute values
_MOST_COSTS = 3_000_000  # numbers in the table of costs, which limits how far segments reach


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
) -> Schedule:
    """Plans from recorded trajectories which steps run the denoiser, and how the others reuse it.

    Needs no run of the model. The whole denoiser's output is reused, so a reused step costs next
    to nothing and ``max_lag`` outputs are kept. The weights are those under which combinations of
    the *uncached* outputs come nearest to the uncached states; ``fit`` fits them to the run itself.

    Args:
        calibration: With trajectories, as ``calibrate`` records them.
        speedup: Compute one step in so many; give this or one of the next two.
        compute: Compute at most this fraction of the steps, in (0, 1].
        steps_computed: Compute exactly so many steps.
        max_lag: How many of the last computed outputs are combined in a reuse.
        memory: How many of the last computed steps the choice of the next ones takes into account,
            2 or 3.
        noise: How far computed outputs of the run are expected from uncached ones, as a mean square
            relative to theirs. The more, the less does a choice rely on large weights.
        early_weight: How many times as much the error of the first state counts as that of the
            last; the model carries early ones on, and how far differs between models.

    Returns:
        A schedule at the granularity "model", with weights. ``fit`` improves them.

    Raises:
        InvalidArgumentError: If the calibration has no trajectories, or a number makes no sense.

    Source: ours; the choice of steps by dynamic programming is akin to arXiv 2602.22654.

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
    segments = Segments.of(trajectories, early_weight)
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
        "weights": "open loop",
        "expected_state_error": f"{relative_error(segments, cost):.3g}",
    }
    return whole_model_schedule(calibration, computed, weights, settings)


def trajectories_of(calibration: Calibration) -> Trajectories:
    """The trajectories of a calibration.

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
            "the calibration has no trajectories, from which steps are planned"
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
    """How many steps a budget leaves to be computed.

    Raises:
        InvalidArgumentError: If not exactly one budget is given, or it makes no sense.
    """
    given = [x for x in (speedup, compute, steps_computed) if x is not None]
    if len(given) != 1:
        raise InvalidArgumentError("give exactly one of speedup, compute and steps_computed.")
    steps, least = trajectories.num_steps, len(trajectories.first_steps())
    if steps_computed is not None:
        count = check_count("steps_computed", steps_computed, least=1)
    elif compute is not None:
        share = check_number("compute", compute)
        if not 0 < share <= 1:
            raise InvalidArgumentError(f"compute must be in (0, 1], got {share:g}.")
        count = int(steps * share + 1e-9)
    else:
        factor = check_number("speedup", speedup)
        if factor < 1:
            raise InvalidArgumentError(f"speedup must be at least 1, got {factor:g}.")
        count = int(steps / factor + 1e-9)
    if not least <= count <= steps:
        raise InvalidArgumentError(
            f"the budget leaves {count} of {steps} steps to be computed; at least {least} and at "
            f"most {steps} can be."
        )
    return count


def whole_model_schedule(
    calibration: Calibration,
    computed: Sequence[bool],
    weights: Sequence[Sequence[float]],
    settings: dict[str, object],
    branch_weights: Sequence[Sequence[Sequence[float]]] = (),
) -> Schedule:
    """A schedule that reuses the whole denoiser's output with these weights.

    Args:
        calibration: With trajectories.
        computed: Whether each step is computed.
        weights: Of the last computed outputs at every step, the newest first; empty where computed.
        settings: For the provenance.
        branch_weights: The same for the further branches of guidance, where each has its own.
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
        own = [trajectories.denoisers[t] == name for t in range(steps)]
        flags = tuple(x or not mine for x, mine in zip(computed, own, strict=True))
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
    """What is to be known of all segments, from inner products.

    Args:
        gram: Inner products of the outputs, summed over the samples, [steps, steps].
        table: Responses of the solver, [steps, steps + 1].
        ends: For each step, where its denoiser's turn ends, [steps].
        sensitivities: How far the final latents move with the latents at each step and at the
            end, [steps + 1]; None takes them as equal.
    """

    def __init__(
        self,
        gram: FloatArray,
        table: FloatArray,
        ends: Sequence[int],
        sensitivities: FloatArray | None = None,
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

    @classmethod
    def of(cls, trajectories: Trajectories, early_weight: float = 1.0) -> Segments:
        """Of all samples together; errors count up to so much more the earlier they are."""
        steps = trajectories.num_steps
        firsts = [*trajectories.first_steps(), steps]
        ends = [next(x for x in firsts if x > t) for t in range(steps)]
        sensitivities = early_weight ** np.linspace(1, 0, steps + 1)
        gram = trajectories.grams.sum(axis=0)
        return cls(gram, trajectories.responses.table, ends, sensitivities)

    def regressors(self, computed: Sequence[int], max_lag: int) -> list[int]:
        """The last computed steps, the newest first, as far as they are of its denoiser's turn."""
        newest = computed[-1]
        return [t for t in reversed(computed[-max_lag:]) if self.ends[t] == self.ends[newest]]


def relative_error(segments: Segments, cost: float) -> float:
    """The root of a sum of costs, relative to what all outputs do to the final state."""
    last = segments.table[:, -1]
    whole = float(last @ segments.gram @ last)
    return float(np.sqrt(cost / whole)) if whole > 0 else 0.0


def choose_steps(
    segments: Segments, count: int, *, memory: int = 2, noise: float = RIDGE
) -> tuple[list[int], float]:
    """The computed steps with the least sum of costs, and that sum.

    Args:
        segments: Of the trajectories.
        count: How many steps are computed.
        memory: How many of the last computed steps the cost of a segment depends on, 2 or 3.
        noise: Of computed outputs, relative; what keeps weights small.

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
            total = value[j][..., None] + costs[j]  # the oldest step is the last but one axis
            best = total.argmin(axis=-2)
            least = np.take_along_axis(total, best[..., None, :], axis=-2)[..., 0, :]
            gaps = np.arange(1, min(reach, steps - 1 - j) + 1)
            # The new state's gap is this one; what was its newest gap comes second.
            following[j + gaps, gaps] = np.moveaxis(least, -1, 0)[gaps - 1]
            choice[j + gaps, gaps] = np.moveaxis(best, -1, 0)[gaps - 1]
        choices.append(choice)
        value = following
    last = np.full(states, np.inf)
    for j in range(max(0, steps - reach), steps):
        last[j] = value[j] + costs[j][..., steps - j - 1]
    at = np.unravel_index(int(last.argmin()), states)
    if not np.isfinite(last[at]):
        raise InvalidArgumentError(f"{count} of {steps} steps cannot be chosen.")
    return _traced(tuple(int(x) for x in at), choices), float(last[at])


def _traced(state: tuple[int, ...], choices: list[npt.NDArray[np.int16]]) -> list[int]:
    """The computed steps that lead to a state (step, gap before it, ...)."""
    chosen = [state[0]]
    for choice in reversed(choices):
        step, gap, *older = state
        state = (step - gap, *older, int(choice[state]))
        chosen.append(state[0])
    return chosen[::-1]


def _reach(steps: int, count: int, memory: int) -> int:
    """The largest gap between computed steps that is looked at."""
    most = int((_MOST_COSTS / steps) ** (1 / memory))
    return min(steps, max(most, -(-steps // count)))


def _costs(segments: Segments, reach: int, memory: int, noise: float) -> FloatArray:
    """Costs by newest computed step, gaps to the older ones (0 for none), and gap to the next."""
    steps = segments.num_steps
    costs = np.full((steps, *(reach + 1 for _ in range(memory - 1)), reach), np.inf)
    for j in range(steps):
        longest = min(reach, int(segments.ends[j]) - j)
        nexts = np.arange(j + 1, j + longest + 1)
        older, is_there, is_legal = _older(segments, j, reach, memory)
        at = np.stack([np.full(is_legal.shape, j), *older], axis=-1)  # the newest first
        there = np.stack([np.ones(is_legal.shape, dtype=bool), *is_there], axis=-1)
        both = there[..., :, None] & there[..., None, :]
        matrix = np.where(both, segments.gram[at[..., :, None], at[..., None, :]], 0.0)
        matrix = matrix + _ridge(matrix, there, noise) + np.eye(memory) * ~there[..., None]
        right = segments.products[j][nexts[:, None], at[..., None, :]] * there[..., None, :]
        solved = np.linalg.solve(matrix[..., None, :, :], right[..., None])[..., 0]
        explained = (right * solved).sum(axis=-1)
        cost = np.maximum(segments.squares[j, nexts] - explained, 0.0)
        costs[j][..., :longest] = np.where(is_legal[..., None], cost, np.inf)
    return costs


def _older(
    segments: Segments, j: int, reach: int, memory: int
) -> tuple[list[npt.NDArray[np.int64]], list[npt.NDArray[np.bool_]], npt.NDArray[np.bool_]]:
    """The computed steps before j for all gaps, whether each can be combined, and which exist."""
    gaps = np.arange(reach + 1)
    shape = (reach + 1,) * (memory - 1)
    position, exists = np.full(shape, j), np.ones(shape, dtype=bool)
    older, is_there = [], []
    for axis in range(memory - 1):
        gap = np.broadcast_to(
            gaps.reshape([-1 if a == axis else 1 for a in range(memory - 1)]), shape
        )
        is_first = position == 0  # nothing is computed before step 0
        exists = exists & ((gap == 0) == is_first) & (position - gap >= 0)
        position = np.maximum(position - gap, 0)
        older.append(position)
        is_there.append((gap > 0) & (segments.ends[position] == segments.ends[j]))
    return older, is_there, exists


def _ridge(matrix: FloatArray, there: npt.NDArray[np.bool_], noise: float) -> FloatArray:
    mean = np.trace(matrix, axis1=-2, axis2=-1) / there.sum(axis=-1)
    ridge: FloatArray = max(noise, 1e-12) * mean[..., None, None] * np.eye(matrix.shape[-1])
    return ridge


def open_loop_weights(
    segments: Segments, computed: Sequence[int], max_lag: int
) -> tuple[tuple[float, ...], ...]:
    """The weights at every step, of uncached outputs; the newest first, none where computed.

    Those of each step are fitted to its own output. Least squares being linear, their sum has
    the least error for the state at the end of the segment, too.
    """
    steps = segments.num_steps
    weights: list[tuple[float, ...]] = [()] * steps
    for number, (j, end) in enumerate(zip(computed, [*computed[1:], steps], strict=True)):
        if end > j + 1:
            known = segments.regressors(computed[: number + 1], max_lag)
            found = guarded_weights(segments, known, range(j + 1, end))
            weights[j + 1 : end] = [tuple(x) for x in found.tolist()]
    return tuple(weights)


def guarded_weights(segments: Segments, known: Sequence[int], reused: range) -> FloatArray:
    """Least-squares weights [reused, lags], of fewer lags where they would come out too large."""
    for lags in range(len(known), 0, -1):
        used = list(known[:lags])
        matrix = segments.gram[np.ix_(used, used)]
        ridge = RIDGE * np.trace(matrix) / lags
        right = segments.gram[np.ix_(used, list(reused))]
        found: FloatArray = np.linalg.lstsq(matrix + ridge * np.eye(lags), right, rcond=None)[0].T
        if np.abs(found).sum(axis=1).max() <= LARGEST_NORM:
            return found
    return np.ones((len(reused), 1))  # holds what was computed last
