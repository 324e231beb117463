"""The two samples that candidates are compared with: the uncached one and the converged one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..errors import InvalidArgumentError
from ..processes import decided_by_rank_zero
from .gains import Trajectory
from .rollouts import Rollouts
from .space import Candidate

UNCACHED, CONVERGED = "uncached", "converged"
CONVERGED_FACTOR = 10  # the converged sample takes this many times the steps of the uncached run
MOST_DEVIATION = 1e-4  # relative L2 distance between two runs of the same generation
_UNCACHED = Candidate(UNCACHED, 1.0)


def sample_training_references(
    rollouts: Rollouts,
    num_steps: int,
    training: range,
    *,
    joint: bool,
    known: Mapping[int, Any],
    is_recorded: Callable[[Trajectory | None], bool] | None,
) -> bool:
    """Samples the references that candidates are compared with; the sampler must repeat itself.

    Only a joint search compares candidates with the converged samples.

    Args:
        rollouts: Runs the sampler and keeps the references.
        num_steps: Solver steps of the uncached run.
        training: Numbers of the generations that candidates are compared on.
        joint: Whether candidates are compared with the converged samples.
        known: Outputs of generations that ran before, by number.
        is_recorded: Whether the trajectory of the first sample is one that was recorded before;
            then it need only be played back to see that it repeats itself. None if nothing was.

    Returns:
        Whether the trajectories that were recorded before are of these samples.

    Raises:
        InvalidArgumentError: If a reference is not finite, or two runs of a generation differ.
    """
    first = training[0]
    replays = is_recorded is not None
    if replays:
        _refuse_deviation(rollouts.replay_reference(UNCACHED, first), first)
    for i in training[replays:]:
        rollouts.set_reference(
            UNCACHED, i, _UNCACHED, with_trajectory=not joint and i not in known, known=known.get(i)
        )
    for i in training if joint else ():
        rollouts.set_reference(CONVERGED, i, _converged(num_steps), with_trajectory=True)
    if is_recorded is not None:
        trajectory = rollouts.trajectory(UNCACHED, first)
        if decided_by_rank_zero(is_recorded(trajectory)):
            return True
    _refuse_deviation(rollouts.deviation(UNCACHED, first, _UNCACHED), first)
    return False


def _refuse_deviation(deviation: float, i: int) -> None:
    if deviation > MOST_DEVIATION:
        raise InvalidArgumentError(
            f"sample({i}) returned different results in two runs (relative L2 distance "
            f"{deviation:.2g}); draw its noise from a generator seeded with i, and put the model "
            "in evaluation mode"
        )


def sample_validation_references(
    rollouts: Rollouts, num_steps: int, validation: range, *, converged: bool
) -> None:
    """Samples the references that the winner and the baselines are measured against.

    Args:
        rollouts: Runs the sampler and keeps the references.
        num_steps: Solver steps of the uncached run.
        validation: Numbers of the generations that the winner is measured on.
        converged: Whether to sample the converged references, too.

    Raises:
        InvalidArgumentError: If a reference is not finite.
    """
    for i in validation:
        rollouts.set_reference(UNCACHED, i, _UNCACHED, with_trajectory=False)
        if converged:
            rollouts.set_reference(CONVERGED, i, _converged(num_steps), with_trajectory=False)


def _converged(num_steps: int) -> Candidate:
    return Candidate(CONVERGED, CONVERGED_FACTOR, num_steps=CONVERGED_FACTOR * num_steps)
