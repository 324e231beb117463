"""The mathematics of carrying schedules and error curves over to another number of steps.

The old steps are an axis of the noise level: step i lies at i and lasts until i + 1. The new steps
are found on it by their timesteps where both are known, and otherwise evenly spaced.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from ..checks import check_number
from ..errors import InvalidArgumentError

FloatArray = npt.NDArray[np.float64]
CARRIED_OVER = "carried over"


"""The entry of a provenance that says so."""


NOT_MEASURED = "carried over, not measured"
_ROUNDING = 1e-9
_SAME_STEP = 1e-4  # of a step: timesteps in single precision are hardly more exact
_BEYOND = 0.1  # of a step: how far past the largest gap the errors are taken to grow on
_DIGITS = 12
_OTHER_UNIT = 100.0  # times as large: that is no other schedule of noise levels


def told(provenance: Mapping[str, str], old: int, new: int) -> dict[str, str]:
    """The provenance of what was carried over, perhaps not for the first time."""
    text = f"from {old} to {new} steps by position in the noise level; not measured"
    before = provenance.get(CARRIED_OVER)
    return {**provenance, CARRIED_OVER: text if before is None else f"{text} (before: {before})"}


def as_timesteps(timesteps: Iterable[float], num_steps: int | None = None) -> tuple[float, ...]:
    """The timesteps as numbers, if there is one for each step and they only fall or only rise.

    Args:
        timesteps: In running order; also an array or a tensor.
        num_steps: How many there must be; None if that is free.

    Raises:
        InvalidArgumentError: If they are not as described.
    """
    try:
        values: tuple[object, ...] = tuple(getattr(timesteps, "tolist", lambda: timesteps)())
    except TypeError as error:
        raise InvalidArgumentError(f"timesteps must be numbers, got {timesteps!r}.") from error
    numbers = tuple(check_number("a timestep", t) for t in values)
    if not numbers or num_steps not in (None, len(numbers)):
        wanted = "at least one" if num_steps is None else str(num_steps)
        raise InvalidArgumentError(
            f"there are {len(numbers)} timesteps, but {wanted} must be given: one for each step."
        )
    _direction(numbers, "given")
    return numbers


def positions(
    old: Sequence[float] | None, new: Sequence[float] | None, *, num_old: int
) -> FloatArray | None:
    """Where the new timesteps lie on the axis of the old steps.

    Before the first and after the last step the axis goes on in steps of the same size.

    Args:
        old: Timesteps in running order, [num_old]; None if unknown.
        new: Likewise, of another number of steps, as ``as_timesteps`` gives them; [new steps].
        num_old: How many old steps there are.

    Returns:
        Positions in old steps, [new steps], not falling; None if the timesteps do not say.

    Raises:
        InvalidArgumentError: If one falls and the other rises, if the old do neither, or if they
            cannot be of the same unit.
    """
    if old is None or new is None or num_old == 1:
        return None
    if tuple(old) == tuple(new):
        return np.arange(num_old, dtype=np.float64)
    direction = _direction(old, "known")
    if _direction(new, "given") not in (0, direction):
        falls, rises = ("known", "given") if direction < 0 else ("given", "known")
        raise InvalidArgumentError(
            f"the {falls} timesteps fall and the {rises} rise; give the model's own timesteps in "
            f"the order in which they are run."
        )
    _check_unit(old, new)
    level, wanted = (direction * _levels(timesteps, old) for timesteps in (old, new))
    spacing = np.diff(level)[np.diff(level) > 0]
    inside = np.interp(wanted, level, np.arange(num_old, dtype=np.float64))
    before = np.minimum(wanted - level[0], 0) / spacing[0]
    after = np.maximum(wanted - level[-1], 0) / spacing[-1]
    found: FloatArray = inside + before + after
    whole = np.round(found)
    is_whole = np.abs(found - whole) <= _SAME_STEP
    found[is_whole] = whole[is_whole]
    return found


def edges(found: FloatArray | None, num_old: int, num_new: int) -> FloatArray:
    """Where on the axis of the old steps each new one begins, and where the last ends.

    Args:
        found: What ``positions`` gave.
        num_old: How many old steps there are.
        num_new: How many new ones.

    Returns:
        From 0 to num_old at most, not falling; [num_new + 1].
    """
    if found is None:
        return np.arange(num_new + 1) * num_old / num_new
    return np.append(np.clip(found, 0, num_old), num_old)


def resample_row(computed: Sequence[bool], begins: FloatArray) -> tuple[bool, ...]:
    """A row of a schedule that computes as often, per step, at every noise level.

    Args:
        computed: True where an old step is computed; [old steps].
        begins: What ``edges`` gave; [new steps + 1].

    Returns:
        True where a new step is computed; the first always is, and the last if it was. [new steps]
    """
    steps = len(computed)
    at = [step for step, is_computed in enumerate(computed) if is_computed]
    gaps = np.diff([*at, steps])
    rate = np.repeat(1 / gaps, gaps)  # one computed step for each gap, spread over it
    mass = np.concatenate([[0.0], np.cumsum(rate)])
    inside = np.diff(np.interp(begins, np.arange(steps + 1), mass))
    width = np.diff(begins)
    is_point = width <= _ROUNDING
    at_point = rate[np.minimum(begins[:-1].astype(np.intp), steps - 1)]
    *earlier, last = diffuse(np.where(is_point, at_point, inside / np.where(is_point, 1.0, width)))
    return (*earlier, last or bool(computed[-1]))


def nearest(values: Sequence[float], begins: FloatArray) -> tuple[float, ...]:
    """What belonged to the old step in which each new one begins; [new steps]."""
    steps = np.clip(begins[:-1].astype(np.intp), 0, len(values) - 1)
    return tuple(values[step] for step in steps)


def between(
    levels: Sequence[float], found: FloatArray | None, num_new: int
) -> tuple[float, ...] | None:
    """Noise levels at the new steps, linearly between those of the old ones.

    Args:
        levels: Of the old steps, only falling or only rising.
        found: What ``positions`` gave.
        num_new: How many new steps there are.

    Returns:
        [new steps]; None if some of them are not told apart.
    """
    places = np.linspace(0, len(levels) - 1, num_new) if found is None else found
    read = np.interp(places, np.arange(len(levels)), levels)
    return tuple(read.tolist()) if len(set(read)) == num_new else None


def diffuse(rate: FloatArray) -> list[bool]:
    """Yes or no at every step, so that the share of yes follows a rate; the first is yes.

    Args:
        rate: Yes for each step, in [0, 1]; [steps].
    """
    due = 1.0
    chosen: list[bool] = []
    for share in rate:
        chosen.append(due >= 1 - _ROUNDING)
        due += float(share) - chosen[-1]
    return chosen


def largest_gap(found: FloatArray, most: int, reach: int) -> int:
    """The most new steps that nowhere lie farther apart than errors are known.

    Args:
        found: Positions of the new steps; [new steps].
        most: The largest gap wanted, in new steps.
        reach: The largest gap that was measured, in old steps.

    Returns:
        A gap in new steps; 0 if even neighbours are farther apart.
    """
    gap = 0
    while gap < most and np.all(found[gap + 1 :] - found[: -gap - 1] <= reach + _BEYOND):
        gap += 1
    return gap


def steps_within(found: FloatArray, run: range, num_old: int) -> range:
    """The new steps that are nearest to one of the old steps in a range.

    Args:
        found: Positions of the new steps; [new steps].
        run: Old steps.
        num_old: How many old steps there are.
    """
    nearest = np.clip(np.floor(found + 0.5), 0, num_old - 1)
    first, stop = np.searchsorted(nearest, [run.start, run.stop])
    return range(int(first), int(stop))


def resample_errors(
    errors: FloatArray, runs: Sequence[tuple[range, range]], found: FloatArray, max_gap: int
) -> FloatArray:
    """Error curves read off at other steps and gaps, linearly between those that were measured.

    Args:
        errors: errors[i, l, k - 1, t] is E(t, k); [samples, layers, old gaps, old steps].
        runs: The old and the new steps at which each layer runs; [layers].
        found: Positions of the new steps; [new steps].
        max_gap: The largest gap wanted, in new steps.

    Returns:
        The same for the new steps and gaps, [samples, layers, max_gap, new steps]; NaN where the
        gap reaches before the layer's first step, and where the layer does not run.
    """
    read = np.full((*errors.shape[:2], max_gap, len(found)), np.nan)
    for layer, (old, new) in enumerate(runs):
        reach = min(errors.shape[2], len(old) - 1)
        measured = errors[:, layer, :reach]
        for gap in range(1, max_gap + 1):
            steps = np.arange(new.start + gap, new.stop)
            distance = found[steps] - found[steps - gap]
            read[:, layer, gap - 1, steps] = _error_at(measured, old, found[steps], distance)
    return read


def _error_at(
    measured: FloatArray, run: range, position: FloatArray, gap: FloatArray
) -> FloatArray:
    """E at fractional positions and gaps, where a gap of 0 has no error.

    The positions are those nearest to the wanted that were measured for the gap; past the largest
    gap the error grows in proportion.

    Args:
        measured: E of one layer; [samples, gaps, steps].
        run: The steps at which the layer ran.
        position: In steps; [wanted].
        gap: In steps; [wanted].

    Returns:
        [samples, wanted].
    """
    table = np.concatenate([np.zeros_like(measured[:, :1]), measured], axis=1)
    reach = table.shape[1] - 1
    known = np.clip(gap, 0, reach)
    step, short = np.floor(position), np.floor(known)
    total = np.zeros((len(table), len(position)))
    for k, share_of_gap in ((short, 1 - (known - short)), (short + 1, known - short)):
        index = np.minimum(k, reach).astype(np.intp)
        for t, share_of_step in ((step, 1 - (position - step)), (step + 1, position - step)):
            nearest = np.clip(t, run.start + index, run.stop - 1).astype(np.intp)
            total += share_of_gap * share_of_step * table[:, index, nearest]
    return total * np.where(known > 0, gap / np.where(known > 0, known, 1), 1)


def _levels(timesteps: Sequence[float], unit: Sequence[float]) -> FloatArray:
    """Timesteps over the largest of a unit, without digits that mean nothing."""
    largest = np.abs(unit).max()
    return np.round(np.array(timesteps) / (largest or 1.0), _DIGITS)


def _direction(timesteps: Sequence[float], which: str) -> int:
    """1 if they rise, -1 if they fall, 0 if there is only one."""
    if len(timesteps) == 1:
        return 0
    changes = np.sign(np.diff(_levels(timesteps, timesteps)))
    if not changes.any() or {-1, 1} <= set(changes):
        raise InvalidArgumentError(
            f"the {which} timesteps neither fall nor rise all the way ({_ends(timesteps)}), so "
            f"they tell no place among other steps."
        )
    return 1 if changes.max() > 0 else -1


def _check_unit(old: Sequence[float], new: Sequence[float]) -> None:
    largest_old, largest_new = (float(np.abs(x).max()) for x in (old, new))
    smaller, larger = sorted((largest_old, largest_new))
    if 0 < smaller and larger / smaller >= _OTHER_UNIT:
        raise InvalidArgumentError(
            f"the given timesteps ({_ends(new)}) are of another unit than the known ones "
            f"({_ends(old)}); give those that the model itself is called with."
        )


def _ends(timesteps: Sequence[float]) -> str:
    shown = [f"{t:g}" for t in timesteps]
    return ", ".join(shown if len(shown) <= 4 else [*shown[:2], "...", shown[-1]])
