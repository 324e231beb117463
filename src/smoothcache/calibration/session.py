"""One calibration run: attaches observers to a model and collects their errors."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import CalibrationError, ScheduleMismatchError
from ..layers.find import confirmed
from ..layers.layer import CacheLayer, is_followed
from ..layers.modules import identify, layer_modules
from ..model.costs import MacCounter
from ..model.target import Target
from ..steps.noise_scheduler import levels_at
from ..tracking.attachment import Attachment
from ..tracking.intercept import Handler
from ..tracking.listener import CallListener, CallMode, DenoiserCall
from ..version import __version__
from .curves import Calibration
from .observe import Watcher, blocks_of
from .observer import LayerObserver, ObserverMemory
from .recording import TrajectoryObserver, TrajectoryPart

_LEAST_NORM = 1e-200  # of an output that is zero; no relative error overflows with it


def _input_shape(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """Returns the shape of the latents, such as "2 x 4 x 32 x 32"; empty if unknown."""
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.ndim > 1]
    return " x ".join(map(str, tensors[0].shape)) if tensors else ""


def run(
    session: CalibrationSession,
    sample: Callable[[int], Any],
    numbers: Sequence[int],
    done: Callable[[], object] = lambda: None,
) -> None:
    """Runs samples with the observers of a session attached."""
    with session.attached():
        for i in numbers:
            session.start(i)
            try:
                sample(i)
            except ScheduleMismatchError as error:
                raise CalibrationError(str(error)) from error
            session.complete()
            done()


@dataclass(frozen=True)
class Part:
    """What one rank has seen of its share of the samples.

    Attributes:
        errors: Number of a sample -> its errors, [layers, max_gap, steps].
        steps_seen: Layer path -> the steps at which it ran.
        denoisers_at: Step -> the denoisers that were called.
        num_steps: Of its samples; 0 if it had none.
        peak_bytes: Most bytes of kept outputs.
        trajectories: Of its samples.
    """

    errors: dict[int, npt.NDArray[np.float64]]
    steps_seen: dict[str, set[int]]
    denoisers_at: dict[int, set[str]]
    num_steps: int
    peak_bytes: int
    trajectories: TrajectoryPart


# A long class, because all measurements end in one result.
class CalibrationSession(CallListener):
    """The observers of one calibration and their measurements.

    Args:
        target: The model.
        layers: To be observed.
        max_gap: The largest gap to measure, in steps.
        tokens: As of ``calibrate``.
        trajectories: Records the trajectories of the same samples.
        first: Number of the first sample that this process runs, in which costs are counted.
    """

    def __init__(
        self,
        target: Target,
        layers: list[CacheLayer],
        max_gap: int,
        tokens: int | None,
        trajectories: TrajectoryObserver,
        first: int = 0,
    ) -> None:
        self._first = first
        self._target = target
        self._trajectories = trajectories
        self._layers = layers
        self._max_gap = max_gap
        self._tokens = tokens
        self._memory = ObserverMemory()
        self._observers = {
            layer.path: LayerObserver(
                layer.path, max_gap, tokens, self._memory, follow=is_followed(layer)
            )
            for layer in layers
        }
        self._blocks = {
            block.path: Watcher()
            for block in blocks_of(layers)
            if block.path not in self._observers
        }
        self._errors: dict[int, npt.NDArray[np.float64]] = {}
        self._counting = ExitStack()
        self._counter: MacCounter | None = None
        self._macs: dict[str, int] = {}
        self._counted_at: dict[str, int] = {}
        self._denoisers_at: dict[int, set[str]] = {}
        self._timesteps: tuple[float, ...] = ()
        self._noise_levels: tuple[float, ...] | None = None
        self._sample = 0
        self._generations = 0
        self._input = ""

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Attaches the observers to the model inside a ``with`` block."""
        blocks = [block for block in blocks_of(self._layers) if block.path in self._blocks]
        modules = layer_modules(self._target, [*self._layers, *blocks])
        handlers: dict[str, Handler] = {**self._observers, **self._blocks}
        handlers = self._trajectories.around(handlers)
        attachment = Attachment(self._target, modules, handlers, self)
        self._clock = attachment.clock
        try:
            yield
        finally:
            attachment.remove()

    def confirmed(self, *, may_take_blocks: bool) -> list[CacheLayer]:
        """Returns the layers that ran, with a block in place of layers that it bypasses."""
        macs = {path: watcher.macs for path, watcher in self._blocks.items()}
        ran = {path: o.macs if o.steps_seen else None for path, o in self._observers.items()}
        mixed = [path for path, observer in self._observers.items() if observer.is_mixed]
        return confirmed(
            self._layers, {**macs, **ran}, mixed=mixed, may_take_blocks=may_take_blocks
        )

    # --------------------------------------------------------------------------- calls

    def before(self, call: DenoiserCall) -> CallMode:
        """Prepares the observers for a call of a denoiser, and counts MACs in its first step."""
        denoiser, tick = call.denoiser, call.tick
        self._generations += tick.starts
        if self._generations > 1:
            raise CalibrationError(
                f"sample({self._sample}) started a second generation; it must run exactly one from "
                "start to end (samplers whose timesteps reverse cannot be calibrated)"
            )
        self._denoisers_at.setdefault(tick.step, set()).add(denoiser)
        self._input = self._input or _input_shape(call.args, call.kwargs)
        counter = None
        if self._sample == self._first and tick.step == self._counted_at.setdefault(
            denoiser, tick.step
        ):
            counter = self._counting.enter_context(MacCounter())
        for observer in self._observers.values():
            observer.begin(tick.step, tick.call if call.branch is None else call.branch, counter)
        for watcher in self._blocks.values():
            watcher.counter = counter
        self._counter = counter
        self._trajectories.before(call)
        return CallMode.UNCOMPILED

    def after(self, call: DenoiserCall) -> None:
        """Ends a call of a denoiser."""
        if self._counter is not None:
            self._macs[call.denoiser] = self._macs.get(call.denoiser, 0) + self._counter.total
        self._end_call()

    def failed(self) -> None:
        """Ends a call that raised."""
        self._end_call()

    def _end_call(self) -> None:
        self._counting.close()
        self._counter = None
        for observer in self._observers.values():
            observer.end()

    # --------------------------------------------------------------------------------- samples

    def start(self, i: int) -> None:
        """Prepares for a sample."""
        self._sample, self._generations = i, 0
        self._trajectories.start(i)
        self._clock.forget()
        for observer in self._observers.values():
            observer.forget()

    def complete(self) -> None:
        """Reads the errors of a finished sample."""
        if not self._generations:
            raise CalibrationError(
                f"sample({self._sample}) never ran the model; it must run the pipeline or module "
                "that was passed to calibrate, from start to end"
            )
        timesteps = tuple(self._clock.timesteps)
        if self._timesteps and len(timesteps) != len(self._timesteps):
            raise CalibrationError(
                f"sample({self._sample}) ran {len(timesteps)} steps, but earlier samples ran "
                f"{len(self._timesteps)}; every sample must run the same number of steps"
            )
        self._timesteps = self._timesteps or timesteps
        self._noise_levels = levels_at(self._target.noise_scheduler, self._clock.entries)
        self._errors[self._sample] = self._read(len(timesteps))
        self._trajectories.complete(list(timesteps))

    def _read(self, num_steps: int) -> npt.NDArray[np.float64]:
        """Reads the errors of a sample, [layers, max_gap, steps]; the only host sync per sample."""
        sums = [observer.sums(num_steps) for observer in self._observers.values()]
        if any(part.device.type == "meta" for part in sums):
            raise CalibrationError(
                "the model is on the meta device, which computes nothing; load its weights"
            )
        values = torch.stack([part.to(sums[0].device) for part in sums]).cpu().double().numpy()
        self._refuse_non_finite(values)
        norms, distances = values[:, :1], values[:, 1:]
        errors = np.where(distances > 0, distances / np.maximum(norms, _LEAST_NORM), 0.0)
        return errors

    def _refuse_non_finite(self, values: npt.NDArray[np.float64]) -> None:
        bad = np.argwhere(~np.isfinite(values[:, 0]))
        if len(bad):
            index, step = bad[np.argmin(bad[:, 1])]
            raise CalibrationError(
                f"the output of {self._layers[index].path!r} is not finite at step {step} of "
                f"sample({self._sample}); check the model's dtype and its inputs"
            )

    # ----------------------------------------------------------------------------------- ranks

    def part(self) -> Part:
        """What this process has seen."""
        return Part(
            self._errors,
            {path: observer.steps_seen for path, observer in self._observers.items()},
            self._denoisers_at,
            len(self._timesteps),
            self._memory.peak,
            self._trajectories.part(),
        )

    def take(self, parts: Sequence[Part]) -> None:
        """Takes in what the other ranks have seen.

        Raises:
            CalibrationError: If their samples ran another number of steps.
        """
        for rank, part in enumerate(parts, start=1):
            if part.num_steps not in (0, len(self._timesteps)):
                raise CalibrationError(
                    f"the samples of rank {rank} ran {part.num_steps} steps, those of rank 0 "
                    f"{len(self._timesteps)}; every sample must run the same number of steps"
                )
            self._errors |= part.errors
            for path, steps in part.steps_seen.items():
                self._observers[path].steps_seen |= steps
            for step, denoisers in part.denoisers_at.items():
                self._denoisers_at.setdefault(step, set()).update(denoisers)
            self._memory.peak = max(self._memory.peak, part.peak_bytes)
        self._trajectories.take([part.trajectories for part in parts])

    # ---------------------------------------------------------------------------------- result

    def result(self) -> Calibration:
        """Returns the calibration."""
        steps = len(self._timesteps)
        runs = [self._steps_of(path) for path in self._observers]
        seen = [observer.steps_seen for observer in self._observers.values()]
        # A denoiser that runs at a single step has nothing to reuse.
        ran = [
            set(run) == at and len(run) >= min(steps, 2) for run, at in zip(runs, seen, strict=True)
        ]
        if not any(ran):
            raise CalibrationError(
                "the model ran, but none of its layers ran at every step "
                f"({', '.join(layer.path for layer in self._layers[:3])}, ...); calibrate the "
                "uncompiled model, and check that it calls these modules"
            )
        errors = np.stack([self._errors[i] for i in sorted(self._errors)])
        for index, run in enumerate(runs):
            for gap in range(1, self._max_gap + 1):
                outside = [t not in run[gap:] for t in range(steps)]
                errors[:, index, gap - 1, outside] = np.nan
        left_out = [x.path for x, did in zip(self._layers, ran, strict=True) if not did]
        provenance = {
            "smoothcache": __version__,
            "torch": str(torch.__version__),
            "created": datetime.date.today().isoformat(),
        }
        if self._input:
            provenance["input"] = self._input
        if left_out:
            provenance["left_out"] = ", ".join(left_out)
        trajectories = self._trajectories.result()
        if self._trajectories.reason:
            provenance["no_trajectories" if trajectories is None else "trajectories"] = (
                self._trajectories.reason
            )
        return Calibration(
            layers=tuple(
                replace(layer, macs=observer.macs, nbytes=observer.nbytes)
                for layer, observer, did in zip(
                    self._layers, self._observers.values(), ran, strict=True
                )
                if did
            ),
            errors=errors[:, ran],
            total_macs=self._mean_macs(),
            timesteps=self._timesteps,
            noise_levels=self._noise_levels,
            model=identify(self._target),
            solver=self._target.solver,
            peak_bytes=self._memory.peak,
            tokens=self._tokens,
            provenance=provenance,
            trajectories=trajectories,
        )

    def _steps_of(self, path: str) -> range:
        """Returns the steps at which the denoiser of a layer was called."""
        steps = [
            step
            for step, denoisers in self._denoisers_at.items()
            if any(f"{path}.".startswith(name and f"{name}.") for name in denoisers)
        ]
        return range(min(steps, default=0), max(steps, default=-1) + 1)

    def _mean_macs(self) -> int:
        """Returns the mean MACs of an uncached step over all denoisers."""
        called = [name for names in self._denoisers_at.values() for name in names]
        return sum(self._macs[name] for name in called) // len(self._denoisers_at)
