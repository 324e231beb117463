"""Runs the user's sampler under observers and measures what reusing each layer would cost."""

from __future__ import annotations

import datetime
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ._attach import Attachment
from ._carried import followed
from ._checks import check_count
from ._intercept import Handler
from ._noise_levels import levels_at
from ._outputs import bases_at, bytes_of, copies_of, float_tensors, minus, taken_apart
from .calibration import Calibration
from .clock import Tick
from .costs import MacCounter
from .denoisers import noise_scheduler, warn_of_randomness
from .distance import l1_distance, l1_norm
from .errors import CalibrationError, InvalidArgumentError, ScheduleMismatchError
from .layers import (
    CacheLayer,
    Granularity,
    confirmed,
    find_layers,
    identify,
    is_followed,
    layer_modules,
)
from .observe import Watcher, blocks_of
from .version import __version__

_TINY = np.finfo(np.float64).tiny


def calibrate(
    model: Any,
    sample: Callable[[int], Any],
    num_samples: int = 10,
    max_gap: int = 3,
    *,
    granularity: Granularity = "auto",
    layers: Sequence[CacheLayer] | None = None,
    tokens: int | None = None,
    progress: bool = True,
) -> Calibration:
    """Measures the error of reusing each layer, for every gap and step, on a few samples.

    The model is not changed, and the samples come out as they would without this. Between calls
    at most ``max_gap`` outputs of each layer are kept (of each of its uses, if the denoiser calls
    it several times in a step). Errors stay on the device until a sample is complete.

    Args:
        model: A diffusers pipeline (all of its denoisers) or any module.
        sample: ``sample(i)`` runs generation number i, with its own prompt and seed, from start
            to end. What it returns is ignored.
        num_samples: How many generations to run.
        max_gap: The largest gap to measure, in steps.
        granularity: What to measure, as for ``find_layers``. Where the first sample shows that a
            block bypasses its layers, the block is measured as a whole, and that sample run again.
        layers: Measure exactly these instead.
        tokens: Compare about this many tokens of each output, evenly spaced along its last
            dimension but one; None compares all. Saves memory and time on large models.
        progress: Whether to show a progress bar.

    Returns:
        Error curves with their spread over the samples, and the cost of each layer. Layers that
        did not run at every step of their denoiser are left out, and so always computed later;
        the ``left_out`` entry of its provenance names them. Steps are counted from where the
        samples begin: image to image is calibrated for the steps that it runs.

    Raises:
        InvalidArgumentError: If an argument has no sensible value.
        LayersNotFoundError: If the model has no layer that could be reused.
        CalibrationError: If ``sample`` never runs the model, runs several generations or a
            varying number of steps, or a layer's output is not finite.

    Source: arXiv 2411.10510, section 3 (calibration); where guidance runs in several calls of a
    step, numerator and denominator are summed over the calls, as they are over a batch.

    Example:
        >>> import torch
        >>> from diffusers import DiTTransformer2DModel
        >>> model = DiTTransformer2DModel(
        ...     num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2,
        ...     sample_size=8,
        ... ).eval()
        >>> def sample(i):
        ...     x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(i))
        ...     for t in (900, 600, 300):
        ...         x = x - 0.1 * model(x, torch.tensor([t]), torch.tensor([i])).sample
        ...     return x
        >>> with torch.no_grad():
        ...     calibration = calibrate(model, sample, num_samples=2, max_gap=2, progress=False)
        >>> calibration.num_steps
        3
    """
    if not callable(sample):
        raise InvalidArgumentError(
            f"sample must be a function of the sample's number, got {type(sample).__name__}"
        )
    check_count("num_samples", num_samples, least=1)
    check_count("max_gap", max_gap, least=1)
    if tokens is not None:
        check_count("tokens", tokens, least=1)
    warn_of_randomness(model)
    found = find_layers(model, granularity=granularity) if layers is None else list(layers)
    _check_layers(found)
    with tqdm(total=num_samples, desc="calibrating", unit="sample", disable=not progress) as bar:
        session = _Session(model, found, max_gap, tokens)
        _run(session, sample, range(1))
        confirmed = session.confirmed(may_take_blocks=layers is None and granularity == "auto")
        known = {(x.path, x.kind) for x in found}
        if {(x.path, x.kind) for x in confirmed} - known:  # the first sample was lost
            session = _Session(model, confirmed, max_gap, tokens)
            _run(session, sample, range(1))
        bar.update()
        _run(session, sample, range(1, num_samples), bar.update)
    return session.result(model)


def _input_shape(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """Shape of what a denoiser denoises, such as "2 x 4 x 32 x 32"; empty if that is not told."""
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.ndim > 1]
    return " x ".join(map(str, tensors[0].shape)) if tensors else ""


def _check_layers(layers: Sequence[CacheLayer]) -> None:
    """Refuses layers that cannot be measured side by side."""
    if not layers:
        raise InvalidArgumentError("layers is empty; leave it out, or give what find_layers found")
    for x in layers:
        for y in layers:
            if x is not y and f"{y.path}.".startswith(x.path and f"{x.path}."):
                raise InvalidArgumentError(
                    f"{y.path!r} is {x.path!r} or inside it; calibrate one of the two"
                )


def _run(
    session: _Session,
    sample: Callable[[int], Any],
    numbers: range,
    done: Callable[[], object] = lambda: None,
) -> None:
    """Runs samples under the observers of a session."""
    with session.attached():
        for i in numbers:
            session.start(i)
            try:
                sample(i)
            except ScheduleMismatchError as error:
                raise CalibrationError(str(error)) from error
            session.complete()
            done()


class _Session:
    """The observers of one calibration and what they have seen."""

    def __init__(
        self, model: Any, layers: list[CacheLayer], max_gap: int, tokens: int | None
    ) -> None:
        self._model = model
        self._layers = layers
        self._max_gap = max_gap
        self._tokens = tokens
        self._memory = _Memory()
        self._observers = {
            layer.path: _Observer(
                layer.path, max_gap, tokens, self._memory, follow=is_followed(layer)
            )
            for layer in layers
        }
        self._blocks = {
            block.path: Watcher()
            for block in blocks_of(layers)
            if block.path not in self._observers
        }
        self._errors: list[npt.NDArray[np.float64]] = []
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
        """While the observers stand in the model."""
        blocks = [block for block in blocks_of(self._layers) if block.path in self._blocks]
        modules = layer_modules(self._model, [*self._layers, *blocks])
        handlers: dict[str, Handler] = {**self._observers, **self._blocks}
        attachment = Attachment(self._model, modules, handlers, self)
        self._clock = attachment.clock
        try:
            yield
        finally:
            attachment.remove()

    def confirmed(self, *, may_take_blocks: bool) -> list[CacheLayer]:
        """The layers that ran, or a block in place of layers that it bypasses."""
        macs = {path: watcher.macs for path, watcher in self._blocks.items()}
        ran = {path: o.macs if o.steps_seen else None for path, o in self._observers.items()}
        mixed = [path for path, observer in self._observers.items() if observer.is_mixed]
        return confirmed(
            self._layers, {**macs, **ran}, mixed=mixed, may_take_blocks=may_take_blocks
        )

    # ------------------------------------------------------------- what the attachment reports

    def before(
        self, denoiser: str, tick: Tick, branch: int | None, args: tuple[Any, ...], kwargs: Any
    ) -> bool:
        """Prepares the observers for a call of a denoiser, and counts MACs in its first step."""
        self._generations += tick.starts
        if self._generations > 1:
            raise CalibrationError(
                f"sample({self._sample}) began a second generation; it must run exactly one from "
                "start to end (a model that runs back and forth in time cannot be calibrated)"
            )
        self._denoisers_at.setdefault(tick.step, set()).add(denoiser)
        self._input = self._input or _input_shape(args, kwargs)
        counter = None
        if self._sample == 0 and tick.step == self._counted_at.setdefault(denoiser, tick.step):
            counter = self._counting.enter_context(MacCounter())
        for observer in self._observers.values():
            observer.begin(tick.step, tick.call if branch is None else branch, counter)
        for watcher in self._blocks.values():
            watcher.counter = counter
        self._counter = counter
        return True

    def after(self, denoiser: str, tick: Tick) -> None:
        """Ends a call of a denoiser."""
        if self._counter is not None:
            self._macs[denoiser] = self._macs.get(denoiser, 0) + self._counter.total
        self._end_call()

    def outside(self) -> None:
        """Lets a call that is no part of a generation pass."""

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
        self._clock.forget()
        for observer in self._observers.values():
            observer.forget()

    def complete(self) -> None:
        """Reads the errors of a sample that has been run."""
        if not self._generations:
            raise CalibrationError(
                f"sample({self._sample}) never ran the model; it must run the pipeline or module "
                "that was passed to calibrate, from start to end"
            )
        timesteps = tuple(self._clock.timesteps)
        if self._timesteps and len(timesteps) != len(self._timesteps):
            raise CalibrationError(
                f"sample({self._sample}) ran {len(timesteps)} steps, the ones before it "
                f"{len(self._timesteps)}; every sample must run the same number of steps"
            )
        self._timesteps = self._timesteps or timesteps
        self._noise_levels = levels_at(noise_scheduler(self._model), self._clock.entries)
        self._errors.append(self._read(len(timesteps)))

    def _read(self, num_steps: int) -> npt.NDArray[np.float64]:
        """The errors of a sample, [layers, max_gap, steps]: the host's only read of them."""
        sums = [observer.sums(num_steps) for observer in self._observers.values()]
        if any(part.device.type == "meta" for part in sums):
            raise CalibrationError(
                "the model is on the meta device, where nothing is computed; load its weights"
            )
        values = torch.stack([part.to(sums[0].device) for part in sums]).cpu().double().numpy()
        self._refuse_non_finite(values)
        norms, distances = values[:, :1], values[:, 1:]
        errors = np.where(distances > 0, distances / np.maximum(norms, _TINY), 0.0)
        return errors

    def _refuse_non_finite(self, values: npt.NDArray[np.float64]) -> None:
        bad = np.argwhere(~np.isfinite(values[:, 0]))
        if len(bad):
            index, step = bad[np.argmin(bad[:, 1])]
            raise CalibrationError(
                f"the output of {self._layers[index].path!r} is not finite at step {step} of "
                f"sample({self._sample}); check the model's dtype and its inputs"
            )

    # ---------------------------------------------------------------------------------- result

    def result(self, model: Any) -> Calibration:
        """Everything that was measured."""
        steps = len(self._timesteps)
        runs = [self._steps_of(path) for path in self._observers]
        seen = [observer.steps_seen for observer in self._observers.values()]
        # A denoiser that runs at a single step of several has nothing to be reused.
        ran = [
            set(run) == at and len(run) >= min(steps, 2) for run, at in zip(runs, seen, strict=True)
        ]
        if not any(ran):
            raise CalibrationError(
                "the model ran, but none of its layers did at every step "
                f"({', '.join(layer.path for layer in self._layers[:3])}, ...); it may be compiled "
                "or call them in a way that cannot be observed"
            )
        errors = np.stack(self._errors)
        for index, run in enumerate(runs):
            for gap in range(1, self._max_gap + 1):
                outside = [t not in run[gap:] for t in range(steps)]
                errors[:, index, gap - 1, outside] = np.nan
        left_out = [x.path for x, did in zip(self._layers, ran, strict=True) if not did]
        solver = noise_scheduler(model)
        provenance = {
            "smoothcache": __version__,
            "torch": str(torch.__version__),
            "created": datetime.date.today().isoformat(),
        }
        if self._input:
            provenance["input"] = self._input
        if left_out:
            provenance["left_out"] = ", ".join(left_out)
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
            model=identify(model),
            solver=None if solver is None else type(solver).__name__,
            peak_bytes=self._memory.peak,
            tokens=self._tokens,
            provenance=provenance,
        )

    def _steps_of(self, path: str) -> range:
        """The steps at which the denoiser of a layer was called."""
        steps = [
            step
            for step, denoisers in self._denoisers_at.items()
            if any(f"{path}.".startswith(name and f"{name}.") for name in denoisers)
        ]
        return range(min(steps, default=0), max(steps, default=-1) + 1)

    def _mean_macs(self) -> int:
        """MACs of an uncached step, over the denoisers that take turns."""
        called = [name for names in self._denoisers_at.values() for name in names]
        return sum(self._macs[name] for name in called) // len(self._denoisers_at)


class _Memory:
    """Bytes of kept outputs, now and at most; and room to work in, which all layers share."""

    def __init__(self) -> None:
        self.held = self.peak = 0
        self._scratch: dict[Any, Tensor] = {}

    def scratch(self, like: Tensor) -> Tensor:
        """A tensor of the same form, to be overwritten."""
        form = (like.shape, like.dtype, like.device)
        if form not in self._scratch:
            self._scratch[form] = torch.empty_like(like)
        return self._scratch[form]

    def hold(self, change: int) -> None:
        self.held += change
        self.peak = max(self.peak, self.held)


class _Observer:
    """Handler of one layer that compares each output with the last ones and changes nothing.

    Of a layer that adds to its input, what it adds is compared, as that is what is reused.
    """

    def __init__(
        self, path: str, max_gap: int, tokens: int | None, memory: _Memory, *, follow: bool
    ) -> None:
        self._path = path
        self._follow = follow
        self._sources: dict[int, tuple[int | None, ...]] = {}  # by the number of inputs
        self.is_mixed = False
        self._max_gap = max_gap
        self._tokens = tokens
        self._memory = memory
        self._kept: dict[tuple[int, int], deque[tuple[int, list[Tensor]]]] = {}
        self._sums: dict[tuple[int, int], Tensor] = {}
        self._counter: MacCounter | None = None
        self._active = False
        self._step = self._branch = self._use = 0
        self.macs = self.nbytes = 0
        self.steps_seen: set[int] = set()

    def begin(self, step: int, branch: int, counter: MacCounter | None) -> None:
        self._step, self._branch, self._use = step, branch, 0
        self._counter = counter
        self._active = True

    def end(self) -> None:
        self._active = False
        self._counter = None

    def forget(self) -> None:
        """Drops the outputs and errors of the last sample."""
        for history in self._kept.values():
            self._memory.hold(-sum(_nbytes(outputs) for _, outputs in history))
        self._kept.clear()
        self._sums.clear()

    def sums(self, num_steps: int) -> Tensor:
        """L1 norms (row 0) and L1 distances for gaps 1..max_gap; [1 + max_gap, steps]."""
        zero = next(iter(self._sums.values())).new_zeros(()) if self._sums else torch.zeros(())
        rows = range(self._max_gap + 1)
        cells = [self._sums.get((row, step), zero) for row in rows for step in range(num_steps)]
        return torch.stack(cells).reshape(self._max_gap + 1, num_steps)

    def __call__(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if not self._active:
            return forward(*args, **kwargs)
        before = self._counter.total if self._counter else 0
        output, values = self._run(forward, args, kwargs)
        if self._counter:
            self.macs += self._counter.total - before
            self.nbytes += bytes_of(output)
        self._compare(self._taken(output, values))
        self.steps_seen.add(self._step)
        self._use += 1
        return output

    def _run(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, list[Any]]:
        """The output, and what would be kept of it."""
        inputs = float_tensors((args, kwargs))
        count = len(inputs)
        if self._follow and count not in self._sources:
            inputs = copies_of(inputs, range(count))  # the layer may write into them
            output, carried = followed(forward, args, kwargs)
            self._sources[count] = carried.sources
            self.is_mixed = self.is_mixed or carried.is_mixed
        else:
            inputs = copies_of(inputs, self._sources.get(count, ()))
            output = forward(*args, **kwargs)
        leaves, _ = taken_apart(output)
        sources = self._sources.get(count, ())
        if len(sources) not in (0, len(leaves)):
            return output, leaves
        bases = bases_at(sources, inputs, leaves)
        return output, [
            leaf if base is None else minus(leaf, base)
            for leaf, base in zip(leaves, bases, strict=True)
        ]

    def _compare(self, outputs: list[Tensor]) -> None:
        history = self._kept.setdefault((self._branch, self._use), deque())
        for value in outputs:
            self._add(0, l1_norm(value))
        for step, earlier in history:
            gap = self._step - step
            if gap <= self._max_gap and _same_shapes(outputs, earlier):
                for value, kept in zip(outputs, earlier, strict=True):
                    self._add(gap, l1_distance(value, kept, self._memory.scratch(value)))
        spent: list[Tensor] = []
        if len(history) == self._max_gap:
            spent = history.popleft()[1]
            self._memory.hold(-_nbytes(spent))
        # Copies, because the model may write into its own outputs.
        history.append((self._step, _copied(outputs, spent)))
        self._memory.hold(_nbytes(outputs))

    def _add(self, row: int, value: Tensor) -> None:
        at = (row, self._step)
        self._sums[at] = self._sums[at] + value if at in self._sums else value

    def _taken(self, output: Any, values: list[Any]) -> list[Tensor]:
        """The tensors that would be kept of an output, on the tokens that are compared."""
        tensors = [x.detach() for x in values if isinstance(x, Tensor)]
        if not tensors:
            raise CalibrationError(
                f"{self._path!r} returned no tensor but {type(output).__name__}, so nothing of it "
                "can be reused; leave it out with find_layers(model, select=...)"
            )
        return [self._thinned(x) for x in tensors]

    def _thinned(self, value: Tensor) -> Tensor:
        if self._tokens is None or value.ndim < 3:
            return value
        return value[..., :: max(1, value.shape[-2] // self._tokens), :]


def _copied(tensors: list[Tensor], into: list[Tensor]) -> list[Tensor]:
    """Copies, in the memory of tensors that are of no more use if they have the same form."""
    if [(x.shape, x.dtype) for x in tensors] != [(x.shape, x.dtype) for x in into]:
        return [tensor.clone() for tensor in tensors]
    return [old.copy_(new) for old, new in zip(into, tensors, strict=True)]


def _nbytes(tensors: list[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _same_shapes(a: list[Tensor], b: list[Tensor]) -> bool:
    return [x.shape for x in a] == [x.shape for x in b]
