"""Layers, calibrations and schedules made up for tests that need no model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from hypothesis import settings
from hypothesis import strategies as st

from smoothcache.calibration.curves import Calibration
from smoothcache.layers.layer import CacheLayer, ModelIdentity
from smoothcache.schedule.row import Row
from smoothcache.schedule.schedule import Schedule
from smoothcache.steps.predictors import PREDICTORS

# Whether a machine is busy is not what the tests are about.
settings.register_profile("smoothcache", deadline=None)


settings.load_profile("smoothcache")


MODEL = ModelIdentity("ToyDiT", "0123456789abcdef")


def layers_of(
    num_blocks: int,
    leaves: Sequence[tuple[str, str]] = (("attn", "self_attn"), ("mlp", "ffn")),
    *,
    macs: int | None = 10,
    stack: str = "blocks",
) -> tuple[CacheLayer, ...]:
    """Blocks that each have these (leaf, kind)."""
    return tuple(
        CacheLayer(f"{stack}.{block}.{leaf}", kind, f"{stack}.{block}", macs)
        for block in range(num_blocks)
        for leaf, kind in leaves
    )


def errors_of(
    values: npt.ArrayLike, samples: int, layers: int, max_gap: int, steps: int
) -> npt.NDArray[np.float64]:
    """A table [samples, layers, max_gap, steps] of these values, NaN where t < k."""
    table = np.array(np.broadcast_to(values, (samples, layers, max_gap, steps)), dtype=np.float64)
    for gap in range(1, max_gap + 1):
        table[:, :, gap - 1, :gap] = np.nan
    return table


def calibration_of(
    values: npt.ArrayLike = 0.1,
    *,
    samples: int = 2,
    layers: Sequence[CacheLayer] | None = None,
    max_gap: int = 3,
    steps: int = 8,
    total_macs: int = 100,
    **others: object,
) -> Calibration:
    """A calibration whose errors are `values`, broadcast to its shape."""
    layers = layers_of(2) if layers is None else tuple(layers)
    return Calibration(
        layers=tuple(layers),
        errors=errors_of(values, samples, len(layers), max_gap, steps),
        total_macs=total_macs,
        timesteps=tuple(float(1000 - 10 * step) for step in range(steps)),
        **{"model": MODEL, **others},  # type: ignore[arg-type]
    )


@st.composite
def calibrations(draw: st.DrawFn, *, max_steps: int = 12) -> Calibration:
    """Small calibrations with errors between 0 and 1, few enough values for ties."""
    samples, steps = draw(st.integers(1, 3)), draw(st.integers(1, max_steps))
    max_gap, layers = draw(st.integers(1, 4)), layers_of(draw(st.integers(1, 3)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    values = rng.integers(0, 11, (samples, len(layers), max_gap, steps)) / 10
    return calibration_of(values, samples=samples, layers=layers, max_gap=max_gap, steps=steps)


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    """Schedules of every form: bound and not, rows shared by a kind and not."""
    num_steps = draw(st.integers(1, 8))
    later = st.lists(st.booleans(), min_size=num_steps - 1, max_size=num_steps - 1)
    gain = st.floats(-2, 3, allow_nan=False)
    row = st.builds(
        lambda steps, predictor, gains: Row((True, *steps), predictor, gains),
        later,
        st.sampled_from([*PREDICTORS]),
        st.none() | st.lists(gain, min_size=num_steps, max_size=num_steps).map(tuple),
    )
    texts = st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=3)
    numbers = st.floats(allow_nan=False, allow_infinity=False)
    if draw(st.booleans()):
        layers = layers_of(draw(st.integers(1, 3)), macs=draw(st.none() | st.integers(0, 10**15)))
        shared = {kind: draw(row) for kind in ("self_attn", "ffn") if draw(st.booleans())}
        rows = {x.path: shared[x.kind] if x.kind in shared else draw(row) for x in layers}
    else:
        layers = None
        rows = draw(st.dictionaries(st.text(max_size=8), row, min_size=1, max_size=4))
    return Schedule(
        num_steps=num_steps,
        rows=rows,
        layers=layers,
        model=draw(st.none() | st.builds(ModelIdentity, st.text(max_size=8), st.text(max_size=8))),
        solver=draw(st.none() | st.text(max_size=8)),
        timesteps=draw(
            st.none() | st.lists(numbers, min_size=num_steps, max_size=num_steps).map(tuple)
        ),
        compute=draw(st.none() | st.floats(0, 1, exclude_min=True)),
        quality=draw(st.dictionaries(st.text(max_size=8), st.floats(allow_nan=False), max_size=2)),
        provenance=draw(texts),
        noise_levels=tuple(1 - i / num_steps for i in range(num_steps)),
    )
