"""The two samples that candidates are compared with: the uncached one and the converged one."""

from __future__ import annotations

from ..errors import InvalidArgumentError
from .rollouts import Rollouts
from .space import Candidate

UNCACHED, CONVERGED = "uncached", "converged"
CONVERGED_FACTOR = 10  # the converged sample takes this many times the steps of the uncached run
MOST_DEVIATION = 1e-4  # relative L2 distance between two runs of the same generation


def sample_references(
    rollouts: Rollouts,
    num_steps: int,
    training: range,
    validation: range,
    *,
    joint: bool,
    takes_num_steps: bool,
) -> None:
    """Samples the references, and checks that the sampler repeats itself.

    Only a joint search compares candidates with the converged samples; any other search needs
    them for the validation alone.

    Args:
        rollouts: Runs the sampler and keeps the references.
        num_steps: Solver steps of the uncached run.
        training: Numbers of the generations that candidates are compared on.
        validation: Numbers of the generations that the winner is measured on.
        joint: Whether candidates are compared with the converged samples.
        takes_num_steps: Whether the sampler can run with another number of steps.

    Raises:
        InvalidArgumentError: If a reference is not finite, or two runs of a generation differ.
    """
    uncached = Candidate(UNCACHED, 1.0)
    converged = Candidate(CONVERGED, CONVERGED_FACTOR, num_steps=CONVERGED_FACTOR * num_steps)
    for i in (*training, *validation):
        trains = i in training
        rollouts.set_reference(UNCACHED, i, uncached, with_trajectory=trains and not joint)
        if joint or (takes_num_steps and not trains):
            rollouts.set_reference(CONVERGED, i, converged, with_trajectory=trains and joint)
    deviation = rollouts.deviation(UNCACHED, training[0], uncached)
    if deviation > MOST_DEVIATION:
        raise InvalidArgumentError(
            f"sample({training[0]}) returned different results in two runs (relative L2 distance "
            f"{deviation:.2g}); draw its noise from a generator seeded with i, and put the model "
            "in evaluation mode"
        )
