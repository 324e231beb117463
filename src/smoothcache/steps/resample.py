"""Resampling of schedules and error curves to another number of steps.

The old steps define an axis over the noise level: step i covers [i, i + 1). New steps are located
on it by their timesteps if both are known, and are evenly spaced otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from ..checks import check_number
from ..errors import InvalidArgumentError

FloatArray = npt.NDArray[np.float64]
CARRIED_OVER = "carried over"
"""Name of the provenance entry of resampled schedules and calibrations."""
NOT_MEASURED = "carried over, not measured"
_ROUNDING = 1e-9
_SAME_STEP = 1e-4  # tolerance in steps, about the resolution of float32 timesteps
_BEYOND = 0.1  # extrapolation past the largest gap, in steps
_DIGITS = 12
_OTHER_UNIT = 100.0  # ratio from which timesteps must be of another unit


def resampled_provenance(provenance: Mapping[str, str], old: int, new: int) -> dict[str, str]:
    """Returns the provenance with a note on resampling; earlier notes are kept."""
    text = f"from {old} to {new} steps by position in the noise level; not measured"
    before = provenance.get(CARRIED_OVER)
    return {**provenance, CARRIED_OVER: text if before is None else f"{text} (before: {before})"}


def as_timesteps(timesteps: Iterable[float], num_steps: int | None = None) -> tuple[float, ...]:
    """Returns validated timesteps as numbers.

    Args:
        timesteps: Timesteps in running order, also as an array or tensor.
        num_steps: Required number of timesteps; None for any.

    Raises:
        InvalidArgumentError: If they are not num_steps finite monotonic numbers.
    """
    try:
        values: tuple[object, ...] = tuple(getattr(timesteps, "tolist", lambda: timesteps)())
    except TypeError as error:
        raise InvalidArgumentError(f"timesteps must be numbers, got {timesteps!r}.") from error
    numbers = tuple(check_number("a timestep", t) for t in values)
    if not numbers or num_steps not in (None, len(numbers)):
        wanted = "at least one" if num_steps is None else str(num_steps)
        raise InvalidArgumentError(
            f"got {len(numbers)} timesteps, expected {wanted}: one for each step."
        )
    _direction(numbers, "given")
    return numbers


def positions(
    old: Sequence[float] | None, new: Sequence[float] | None, *, num_old: int
) -> FloatArray | None:
    """Locates new timesteps on the axis of the old steps.

    Before the first and after the last step, the axis is extrapolated linearly.

    Args:
        old: Old timesteps in running order, [num_old]; None if unknown.
        new: New timesteps from ``as_timesteps``, [new steps]; None if unknown.
        num_old: Number of old steps.

    Returns:
        Positions in old steps, [new steps], non-decreasing; None if timesteps are unknown.

    Raises:
        InvalidArgumentError: If their directions differ, if the old timesteps are not monotonic, or
            if their units differ.
    """
    if old is None or new is None or num_old == 1:
        return None
    if tuple(old) == tuple(new):
        return np.arange(num_old, dtype=np.float64)
    direction = _direction(old, "known")
    if _direction(new, "given") not in (0, direction):
        falls, rises = ("known", "given") if direction < 0 else ("given", "known")
        raise InvalidArgumentError(
            f"the {falls} timesteps fall and the {rises} rise; pass the model's own timesteps in "
            f"running order."
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
    """Returns the edges of the new steps on the axis of the old steps.

    Args:
        found: Result of ``positions``.
        num_old: Number of old steps.
        num_new: Number of new steps.

    Returns:
        Edges in [0, num_old], non-decreasing; [num_new + 1].
    """
    if found is None:
        return np.arange(num_new + 1) * num_old / num_new
    return np.append(np.clip(found, 0, num_old), num_old)


def resample_row(computed: Sequence[bool], begins: FloatArray) -> tuple[bool, ...]:
    """Resamples a row of a schedule with the same fraction of computed steps at every noise level.

    Args:
        computed: True where an old step is computed; [old steps].
        begins: Result of ``edges``; [new steps + 1].

    Returns:
        True where a new step is computed; [new steps]. The first step is always computed, the last
        step if it was before.
    """
    steps = len(computed)
    at = [step for step, is_computed in enumerate(computed) if is_computed]
    gaps = np.diff([*at, steps])
    rate = np.repeat(1 / gaps, gaps)  # one computed step per gap, distributed over the gap
    mass = np.concatenate([[0.0], np.cumsum(rate)])
    inside = np.diff(np.interp(begins, np.arange(steps + 1), mass))
    width = np.diff(begins)
    is_point = width <= _ROUNDING
    at_point = rate[np.minimum(begins[:-1].astype(np.intp), steps - 1)]
    *earlier, last = diffuse(np.where(is_point, at_point, inside / np.where(is_point, 1.0, width)))
    return (*earlier, last or bool(computed[-1]))


def nearest(values: Sequence[float], begins: FloatArray) -> tuple[float, ...]:
    """Returns the value of the old step in which each new step begins; [new steps]."""
    steps = np.clip(begins[:-1].astype(np.intp), 0, len(values) - 1)
    return tuple(values[step] for step in steps)


def between(
    levels: Sequence[float], found: FloatArray | None, num_new: int
) -> tuple[float, ...] | None:
    """Interpolates noise levels linearly to the new steps.

    Args:
        levels: Noise levels of the old steps, monotonic.
        found: Result of ``positions``.
        num_new: Number of new steps.

    Returns:
        Noise levels [new steps]; None if some of them coincide.
    """
    places = np.linspace(0, len(levels) - 1, num_new) if found is None else found
    read = np.interp(places, np.arange(len(levels)), levels)
    return tuple(read.tolist()) if len(set(read)) == num_new else None


def diffuse(rate: FloatArray) -> list[bool]:
    """Rounds a rate to booleans by error diffusion; the first is True.

    Args:
        rate: Wanted fraction of True at each step, in [0, 1]; [steps].
    """
    accumulated = 1.0
    chosen: list[bool] = []
    for fraction in rate:
        chosen.append(accumulated >= 1 - _ROUNDING)
        accumulated += float(fraction) - chosen[-1]
    return chosen


def largest_gap(found: FloatArray, most: int, reach: int) -> int:
    """Returns the largest gap in new steps that lies within the measured gaps everywhere.

    Args:
        found: Positions of the new steps; [new steps].
        most: Upper limit, in new steps.
        reach: Largest measured gap, in old steps.

    Returns:
        A gap in new steps; 0 if adjacent steps are farther apart than ``reach``.
    """
    gap = 0
    while gap < most and np.all(found[gap + 1 :] - found[: -gap - 1] <= reach + _BEYOND):
        gap += 1
    return gap


def steps_within(found: FloatArray, run: range, num_old: int) -> range:
    """Returns the new steps whose nearest old step is in a range.

    Args:
        found: Positions of the new steps; [new steps].
        run: Range of old steps.
        num_old: Number of old steps.
    """
    nearest = np.clip(np.floor(found + 0.5), 0, num_old - 1)
    first, stop = np.searchsorted(nearest, [run.start, run.stop])
    return range(int(first), int(stop))


def resample_errors(
    errors: FloatArray, runs: Sequence[tuple[range, range]], found: FloatArray, max_gap: int
) -> FloatArray:
    """Interpolates error curves linearly to other steps and gaps.

    Args:
        errors: errors[i, l, k - 1, t] is E(t, k); [samples, layers, old gaps, old steps].
        runs: The old and the new steps at which each layer runs; [layers].
        found: Positions of the new steps; [new steps].
        max_gap: Largest gap of the result, in new steps.

    Returns:
        Errors [samples, layers, max_gap, new steps]; NaN where the gap reaches before the layer's
        first step, and where the layer does not run.
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
    """Interpolates E at fractional positions and gaps; a gap of 0 has no error.

    Positions are clamped to those measured for the gap. Past the largest gap, the error grows in
    proportion.

    Args:
        measured: E of one layer; [samples, gaps, steps].
        run: Steps at which the layer ran.
        position: Positions in steps; [points].
        gap: Gaps in steps; [points].

    Returns:
        Errors [samples, points].
    """
    table = np.concatenate([np.zeros_like(measured[:, :1]), measured], axis=1)
    reach = table.shape[1] - 1
    known = np.clip(gap, 0, reach)
    step, lower = np.floor(position), np.floor(known)
    total = np.zeros((len(table), len(position)))
    for k, gap_weight in ((lower, 1 - (known - lower)), (lower + 1, known - lower)):
        index = np.minimum(k, reach).astype(np.intp)
        for t, step_weight in ((step, 1 - (position - step)), (step + 1, position - step)):
            nearest = np.clip(t, run.start + index, run.stop - 1).astype(np.intp)
            total += gap_weight * step_weight * table[:, index, nearest]
    return total * np.where(known > 0, gap / np.where(known > 0, known, 1), 1)


def _levels(timesteps: Sequence[float], unit: Sequence[float]) -> FloatArray:
    """Returns timesteps divided by the largest of ``unit``, rounded to significant digits."""
    largest = np.abs(unit).max()
    return np.round(np.array(timesteps) / (largest or 1.0), _DIGITS)


def _direction(timesteps: Sequence[float], which: str) -> int:
    """Returns 1 if timesteps rise, -1 if they fall, 0 if there is only one."""
    if len(timesteps) == 1:
        return 0
    changes = np.sign(np.diff(_levels(timesteps, timesteps)))
    if not changes.any() or {-1, 1} <= set(changes):
        raise InvalidArgumentError(
            f"the {which} timesteps neither only fall nor only rise ({_ends(timesteps)}), so other "
            f"steps cannot be located among them."
        )
    return 1 if changes.max() > 0 else -1


def _check_unit(old: Sequence[float], new: Sequence[float]) -> None:
    largest_old, largest_new = (float(np.abs(x).max()) for x in (old, new))
    smaller, larger = sorted((largest_old, largest_new))
    if 0 < smaller and larger / smaller >= _OTHER_UNIT:
        raise InvalidArgumentError(
            f"the given timesteps ({_ends(new)}) are of another unit than the known timesteps "
            f"({_ends(old)}); pass the timesteps that the model itself is called with."
        )


def _ends(timesteps: Sequence[float]) -> str:
    shown = [f"{t:g}" for t in timesteps]
    return ", ".join(shown if len(shown) <= 4 else [*shown[:2], "...", shown[-1]])
