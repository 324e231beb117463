"""Runs a model under a schedule: ``cached`` for a block of code, ``enable`` until disabled."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..checks import listed
from ..errors import (
    InvalidArgumentError,
    ScheduleMismatchError,
    SmoothCacheError,
    SmoothCacheWarning,
)
from ..layers.find import find_layers
from ..layers.layer import CacheLayer, is_followed, is_residual
from ..layers.modules import identify, layer_modules
from ..model.denoisers import find_denoisers, warn_of_randomness
from ..model.part import PartOfPipeline
from ..schedule.schedule import Schedule
from ..steps.noise_scheduler import noise_scheduler
from ..steps.predictors import axis_positions
from ..tracking.attachment import Attachment
from ..tracking.clock import Tick
from .reused_layer import Call, ReusedLayer
from .summary import OTHER_SHAPES, Summary, Tally

Store = Literal["device", "cpu"]
"""Where kept values lie: on the device of the layer, or in host memory."""
NEVER_SEEN = "no value had been computed for this call"
_NOT_VOUCHED = "it could have been another generation's value"
_NOT_TOLD = "the calls of a step could not be told apart"


@contextmanager
def cached(
    model: Any, schedule: Schedule, *, check_finite: bool = False, store: Store = "device"
) -> Iterator[Run]:
    """Runs a model under a schedule inside a ``with`` block.

    Args:
        model: A diffusers pipeline (all of its denoisers) or any module.
        schedule: What to compute and what to reuse at every step.
        check_finite: Never reuse a value that has a NaN or an infinity in it, but compute the
            layer again and count it. The host then waits for every value that is kept.
        store: Where kept values lie: on the "device" of the layer, or in host memory ("cpu"),
            from where they are fetched for each reuse; on CUDA pinned, and ahead of time.

    Yields:
        The run; its ``summary()`` says what happened, during the block and after it.

    Raises:
        ScheduleMismatchError: If the schedule does not fit the model (nothing is altered then),
            or a generation has another number of steps than the schedule.
        AlreadyCachedError: If the model runs under a schedule already.
        InvalidArgumentError: If ``store`` is none of the two.
        SmoothCacheError: If a compiled model is to keep values in host memory.

    Example:
        >>> from diffusers import DiTTransformer2DModel
        >>> model = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, num_layers=1)
        >>> with cached(model, Schedule.uniform(model, num_steps=4, interval=2)) as run:
        ...     pass  # run the sampler here
        >>> run.summary().finished
        0
    """
    run = _enabled(model, schedule, check_finite, store, stacklevel=5)
    try:
        yield run
        silent = run._what_ran_beside()
    finally:
        run._detach()
    run._refuse_too_few_steps()
    if silent:
        warnings.warn(silent, SmoothCacheWarning, stacklevel=3)


def enable(
    model: Any, schedule: Schedule, *, check_finite: bool = False, store: Store = "device"
) -> Run:
    """Runs a model under a schedule until the returned handle is disabled.

    Arguments and errors are those of ``cached``.

    Args:
        model: A diffusers pipeline (all of its denoisers) or any module.
        schedule: What to compute and what to reuse at every step.
        check_finite: Never reuse a value that has a NaN or an infinity in it.
        store: Where kept values lie: on the "device" of the layer, or in host memory ("cpu").

    Returns:
        The run; ``disable()`` ends it.

    Raises:
        ScheduleMismatchError: If the schedule does not fit the model; nothing is altered then.
        AlreadyCachedError: If the model runs under a schedule already.
        InvalidArgumentError: If ``schedule`` is no schedule, or ``store`` is none of the two.
        SmoothCacheError: If a compiled model is to keep values in host memory.

    Example:
        >>> from diffusers import DiTTransformer2DModel
        >>> model = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, num_layers=1)
        >>> handle = enable(model, Schedule.uniform(model, num_steps=4, interval=2))
        >>> handle.disable()
    """
    return _enabled(model, schedule, check_finite, store, stacklevel=4)


def _enabled(
    model: Any, schedule: Schedule, check_finite: bool, store: Store, stacklevel: int
) -> Run:
    if not isinstance(schedule, Schedule):
        raise InvalidArgumentError(
            f"expected a Schedule, got {type(schedule).__name__}; plan one, or Schedule.load a file"
        )
    if store not in get_args(Store):
        raise InvalidArgumentError(f"store must be 'device' or 'cpu', got {store!r}.")
    warn_of_randomness(model, stacklevel)
    model = _planned_part(model, schedule)
    return Run(model, bound_schedule(model, schedule), check_finite, store)


def bound_schedule(model: Any, schedule: Schedule) -> Schedule:
    """The schedule for exactly this model's layers.

    Raises:
        ScheduleMismatchError: If it does not fit the model.
    """
    model = _planned_part(model, schedule)
    layers = find_layers(model) if schedule.layers is None else schedule.layers
    return schedule.bind(layers, identify(model))


def _planned_part(model: Any, schedule: Schedule) -> Any:
    """The pipeline, or the one of its denoisers that the schedule was planned for alone."""
    denoisers = find_denoisers(model)
    if schedule.model is None or len(denoisers) == 1 or identify(model) == schedule.model:
        return model
    fitting = [name for name, part in denoisers.items() if identify(part) == schedule.model]
    return PartOfPipeline(model, fitting[0]) if len(fitting) == 1 else model


class Run:
    """A model running under a schedule.

    Attributes:
        schedule: The schedule, bound to the model's layers.
        report: What ``accelerate`` measured; None under ``enable`` and ``cached``.
    """

    report: Any = None

    def __init__(
        self, model: Any, schedule: Schedule, check_finite: bool = False, store: Store = "device"
    ) -> None:
        self.schedule = schedule
        self._on_host = store == "cpu"
        self._tally = Tally()
        layers = schedule.layers or ()
        self._call_of = {name: Call() for name in find_denoisers(model)}  # one may call another
        self._layers = {layer.path: self._reused(layer, check_finite) for layer in layers}
        self._shapes: dict[tuple[str, int | None], Any] = {}  # of a branch in this generation
        self._seen: dict[tuple[str, int | None], Any] = {}  # those that there are slots for
        self._finished = self._broken_off = self._reused_before = self._outside = 0
        self._steps_seen = 0
        self._calls = self._calls_before = 0  # in this step, and in the one before
        self._reused_before_call = 0
        self._reusing: set[tuple[str, int | None]] = set()  # denoisers and branches, in this step
        self._open = self._warned = self._was_called = False
        self._model = model
        self._solvers = {schedule.solver}  # the one that was planned for, and those warned of
        modules = layer_modules(model, list(layers))
        self._nest(modules)
        self._beside: dict[str, None] = {}  # layers that ran outside any generation
        self._is_outside = self._warned_of_stray = False
        for call in self._call_of.values():
            call.stray = self._notice_stray
        self._attachment: Attachment | None = None
        # Bound methods, because Python takes longer to call objects.
        handlers = {path: layer.__call__ for path, layer in self._layers.items()}
        self._attachment = attachment = Attachment(
            model,
            modules,
            handlers,
            self,
            schedule.timesteps,
            schedule.num_steps,
            self._forget,
        )
        self._clock = attachment.clock
        self._denoisers = attachment.denoisers
        self._by_denoiser: dict[str, list[ReusedLayer]] = {name: [] for name in self._call_of}
        for path, reused in self._layers.items():
            self._by_denoiser[_denoiser_of(path, self._call_of)].append(reused)
        for chain in self._by_denoiser.values():
            for layer, following in pairwise(chain):
                layer.following = following

    def _reused(self, layer: CacheLayer, check_finite: bool) -> ReusedLayer:
        schedule = self.schedule
        row = schedule.rows[layer.path]
        return ReusedLayer(
            layer.path,
            row.computed,
            row.predictor,
            self._call_of[_denoiser_of(layer.path, self._call_of)],
            self._tally,
            positions=axis_positions(row.axis, schedule.num_steps, schedule.noise_levels),
            gains=row.gains,
            weights=row.weight_tables,
            batch_parts=row.batch_parts,
            residual=is_residual(layer),
            follow=is_followed(layer),
            check_finite=check_finite,
            on_host=self._on_host,
        )

    def _nest(self, modules: Mapping[str, nn.Module]) -> None:
        """Tells every layer which others lie in it, also where those stand in a second place."""
        layers = {module: self._layers[path] for path, module in modules.items()}
        for outer, layer in layers.items():
            within = (x for x in outer.modules() if x is not outer)
            layer.inner = [layers[x] for x in within if x in layers]

    # ------------------------------------------------------------------------------- the user

    def disable(self) -> None:
        """Restores the model and frees all kept values.

        Raises:
            SmoothCacheError: If it was disabled before.
        """
        if self._attachment is None:
            raise SmoothCacheError("this run has been disabled already")
        silent = self._what_ran_beside()
        self._detach()
        if silent:
            warnings.warn(silent, SmoothCacheWarning, stacklevel=2)
        if self._too_few_steps():
            warnings.warn(self._too_few_steps(), SmoothCacheWarning, stacklevel=2)

    def reset(self) -> None:
        """Ends the current generation; the next call of the model begins a new one."""
        self._clock.forget()
        if self._attachment is not None:
            self._attachment.turn.forget()
        self._forget()
        self._close_generation()

    def summary(self) -> Summary:
        """What was computed and reused so far.

        Returns:
            Counts of generations, steps, layer calls and bytes up to now.
        """
        is_complete = self._open and self._steps_seen >= self.schedule.num_steps
        return Summary(
            schedule=self.schedule,
            finished=self._finished + is_complete,
            broken_off=self._broken_off,
            steps_under_way=self._steps_seen if self._open and not is_complete else 0,
            computed=self._tally.computed,
            reused=self._tally.reused,
            outside=self._outside,
            recomputed=dict(self._tally.recomputed),
            peak_bytes=self._tally.peak_bytes,
            held_bytes=self._tally.held_bytes,
            never_ran=tuple(path for path, layer in self._layers.items() if not layer.ever_ran),
        )

    # ------------------------------------------------------------- what the attachment reports

    def before(
        self, denoiser: str, tick: Tick, branch: int | None, args: tuple[Any, ...], kwargs: Any
    ) -> bool:
        """Prepares the layers for a call of a denoiser; the first of each form is to be seen."""
        self._is_outside = False
        self._refuse_checkpointing(denoiser)
        if tick.starts:
            for layer in self._layers.values():
                layer.ran_before |= layer.ran
                layer.ran = False
            self._close_generation()
            self._forget()
            self._refuse_announced_steps()
            self._warn_of_another_solver()
            self._open = True
        self._refuse_too_many_steps(tick)
        self._steps_seen = tick.step + 1
        if tick.call == 0:
            self._calls, self._calls_before = 0, self._calls
            self._reusing.clear()
            for layer in self._layers.values():
                layer.expire(tick.step) if tick.vouched else layer.forget()
        self._calls += 1
        self._reused_before_call = self._tally.reused
        self._refuse_mistaken_branch(denoiser, tick)
        reason = self._refresh(denoiser, tick, branch, args, kwargs)
        self._refuse_host_memory()
        must_be_seen = self._is_compiled and self._must_be_seen(denoiser, branch)
        self._call_of[denoiser].begin(tick.step, branch, reason)
        if self._is_compiled:
            for layer in self._by_denoiser[denoiser]:
                layer.begin_in_graphs(is_seen=must_be_seen)
        if self._on_host and self._by_denoiser[denoiser]:
            self._by_denoiser[denoiser][0].prefetch()
        return must_be_seen

    def after(self, denoiser: str, tick: Tick) -> None:
        """Lets the layers run as they are until the next call."""
        self._end_call(denoiser)
        self._was_called = True
        if self._seen and any(layer.must_be_seen for layer in self._by_denoiser[denoiser]):
            self._seen.pop((denoiser, self._call_of[denoiser].branch), None)
        if self._tally.reused > self._reused_before_call:
            self._reusing.add((denoiser, self._call_of[denoiser].branch))
        if tick.step == self.schedule.num_steps - 1:
            self._drop_what_found_no_use(denoiser)
            self._warn_of_what_did_nothing()

    def outside(self) -> None:
        """Counts a call that is no part of a generation; it runs in full."""
        self._outside += 1
        self._is_outside = True

    def failed(self) -> None:
        """Forgets a generation that an exception broke off."""
        for denoiser in self._by_denoiser:
            self._end_call(denoiser)
        self._forget()
        self._broken_off += self._open
        self._open = False

    @property
    def _is_compiled(self) -> bool:
        """Whether parts of the model are compiled, as far as is known."""
        return self._attachment is not None and self._attachment.is_compiled

    def _end_call(self, denoiser: str) -> None:
        self._call_of[denoiser].number = 0
        if self._is_compiled:
            for layer in self._by_denoiser[denoiser]:
                layer.end_in_graphs()
        elif self._call_of[denoiser].was_traced and self._attachment is not None:
            self._attachment.is_compiled = True

    # ---------------------------------------------------------------------------- generations

    def _refresh(
        self, denoiser: str, tick: Tick, branch: int | None, args: tuple[Any, ...], kwargs: Any
    ) -> str:
        """Drops values that this call must not reuse; says why some may be missing."""
        if branch is None:
            return _NOT_TOLD
        shapes = _shapes((args, kwargs))
        known = self._shapes.get((denoiser, branch), shapes)
        self._shapes[denoiser, branch] = shapes
        if tick.vouched and known == shapes:
            return NEVER_SEEN
        for layer in self._by_denoiser[denoiser]:
            layer.forget(branch)
        return OTHER_SHAPES if known != shapes else _NOT_VOUCHED

    def _must_be_seen(self, denoiser: str, branch: int | None) -> bool:
        """Whether layers may return what no slots were made for: the call runs uncompiled then."""
        shapes = self._shapes.get((denoiser, branch))
        if branch is None or self._seen.get((denoiser, branch)) == shapes:
            return False
        self._seen[denoiser, branch] = shapes
        for layer in self._by_denoiser[denoiser]:
            layer.release(branch)
        return True

    def _drop_what_found_no_use(self, denoiser: str) -> None:
        """Holds nothing beyond the last step: of a branch after its call, all after the last call.

        Nobody says which call is the last. As many as in the step before are expected; a branch
        that was left out there, and comes back in the very last step, is computed.
        """
        if self._call_of[denoiser].branch is not None:
            for layer in self._by_denoiser[denoiser]:
                layer.forget(self._call_of[denoiser].branch)
        last = self.schedule.num_steps - 1
        stages = (self._clock.stages(last) or 1) / (self._clock.stages(last - 1) or 1)
        if self._calls >= self._calls_before * stages:
            for layer in self._layers.values():
                layer.forget()

    def _forget(self) -> None:
        self._shapes.clear()
        for layer in self._layers.values():
            layer.forget()

    def _close_generation(self) -> None:
        if self._open:
            is_complete = self._steps_seen >= self.schedule.num_steps
            self._finished += is_complete
            self._broken_off += not is_complete
        self._open = False
        self._reused_before = self._tally.reused

    def _detach(self) -> None:
        if self._attachment is not None:
            self._attachment.remove()
            self._attachment = None
            self._forget()
            for layer in self._layers.values():
                layer.release()

    # -------------------------------------------------------------------------------- refusals

    def _refuse_checkpointing(self, denoiser: str) -> None:
        module = self._denoisers[denoiser]
        if torch.is_grad_enabled() and getattr(module, "is_gradient_checkpointing", False):
            raise SmoothCacheError(
                "gradient checkpointing runs layers again in the backward pass, where nothing is "
                "reused; call disable_gradient_checkpointing() or sample under torch.no_grad()"
            )

    def _refuse_host_memory(self) -> None:
        if self._on_host and self._is_compiled:
            raise SmoothCacheError(
                "a compiled model keeps its values where its graphs find them, on the device; "
                "leave out store='cpu', or do not compile the model"
            )

    def _refuse_announced_steps(self) -> None:
        announced = self._clock.num_steps
        planned = self.schedule.num_steps
        if announced is not None and announced != planned:
            raise ScheduleMismatchError(
                f"the noise scheduler announces {announced} steps, but the schedule was made for "
                f"{planned}; ask for {planned} steps, or plan for {announced}"
            )

    def _refuse_too_many_steps(self, tick: Tick) -> None:
        planned = self.schedule.num_steps
        if tick.step >= planned:
            raise ScheduleMismatchError(
                f"the generation has come to step {tick.step + 1}, but the schedule covers "
                f"{planned}; plan for the right number of steps, or call run.reset() if a new "
                "generation has begun"
            )

    def _refuse_mistaken_branch(self, denoiser: str, tick: Tick) -> None:
        """Refuses calls that turn out to be alike after one has reused what may be another's."""
        attachment = self._attachment
        mistaken = None if attachment is None else attachment.branches[denoiser].mistaken
        if mistaken is not None and (denoiser, mistaken) in self._reusing:
            raise ScheduleMismatchError(
                f"in step {tick.step} the model was called twice with the same latents and the "
                "same conditioning, so what tells the calls apart is hidden (a perturbed model, "
                "say), and the first may have reused a value of the second; put each into a "
                "cache_context of its own name, pass the model what tells them apart, or plan for "
                "the first such step to be computed"
            )

    def _too_few_steps(self) -> str:
        """What to say of a last generation that ended early; nothing if it did not.

        A pipeline's scheduler announced the right number, so there it was interrupted.
        """
        planned = self.schedule.num_steps
        if not self._open or self._clock.num_steps is not None or self._steps_seen >= planned:
            return ""
        return (
            f"the last generation ended after {self._steps_seen} steps, but the schedule covers "
            f"{planned}; plan for {self._steps_seen} steps (if it was broken off on purpose, call "
            "run.reset())"
        )

    def _refuse_too_few_steps(self) -> None:
        if self._too_few_steps():
            raise ScheduleMismatchError(self._too_few_steps())

    def _warn_of_another_solver(self) -> None:
        """What was measured under one noise scheduler does not hold under another."""
        planned, solver = self.schedule.solver, noise_scheduler(self._model)
        name = type(solver).__name__
        if planned is None or solver is None or name in self._solvers:
            return
        self._solvers.add(name)
        warnings.warn(
            f"the schedule was measured under {planned}, but the noise scheduler is {name}: its "
            "errors are not known there; calibrate with the scheduler that you sample with",
            SmoothCacheWarning,
            stacklevel=2,
        )

    def _notice_stray(self, path: str) -> None:
        """Notices a layer that runs while its denoiser's forward does not: it runs as it is."""
        self._beside[path] = None
        if self._is_outside or self._warned_of_stray:
            return
        self._warned_of_stray = True
        warnings.warn(
            f"layer {path!r} ran without its denoiser's forward, so its step cannot be told and "
            "nothing is reused; wrap the function that walks the blocks in an nn.Module whose "
            "forward takes the latents and the timestep, and plan for that module",
            SmoothCacheWarning,
            stacklevel=2,
        )

    def _what_ran_beside(self) -> str:
        """What to say of a run that something else than its denoisers took part in."""
        names = {d: f"{type(d).__name__}{f' ({n})' * bool(n)}" for n, d in self._denoisers.items()}
        advice = "enable the pipeline or the module that the sampler calls"
        if not isinstance(self._model, nn.Module):
            now = list(find_denoisers(self._model).values())
            gone = [name for denoiser, name in names.items() if denoiser not in now]
            if gone:
                return (
                    f"the pipeline's denoiser was exchanged while enabled: {listed(gone)} is no "
                    f"longer in it, and its successor runs without the schedule; {advice}"
                )
        if not (self._was_called or self._broken_off):
            ran = f", though layers ran without it: {listed(list(self._beside))}"
            return (
                f"no generation was seen: {listed(list(names.values()))} was never called by a "
                f"sampler{ran * bool(self._beside)}; did another object run? {advice}"
            )
        if self._beside:
            return (
                f"{len(self._beside)} layers of the schedule also ran outside any generation, in "
                f"full ({listed(list(self._beside))}); a pipeline with another noise scheduler "
                f"than the enabled one's may have called them: {advice}"
            )
        return ""

    def _warn_of_what_did_nothing(self) -> None:
        """Says once if a finished generation reused nothing, or bypassed some of the layers."""
        if self._warned or self.schedule.is_all_compute:
            return
        ran = [path for path, layer in self._layers.items() if layer.ran]
        idle = [path for path in self._layers if path not in ran]
        if self._tally.reused == self._reused_before:
            why = (
                f"({sum(self._tally.recomputed.values())} layer calls had to be computed: "
                f"{', '.join(self._tally.recomputed)})"
                if ran
                else "(none of its layers ran: does the model bypass them?)"
            )
            message = f"the schedule reused nothing in a finished generation {why}"
        elif idle:
            message = (
                f"{len(idle)} of the {len(self._layers)} layers of the schedule never ran "
                f"({listed(idle)}); smoothcache.observe_layers finds those that do"
            )
        else:
            return
        self._warned = True
        warnings.warn(message, SmoothCacheWarning, stacklevel=2)


def _shapes(arguments: Any) -> list[Any]:
    leaves = pytree.tree_leaves(arguments)
    return [(x.shape, x.dtype, x.device) for x in leaves if isinstance(x, Tensor)]


def _denoiser_of(path: str, denoisers: Iterable[str]) -> str:
    """The denoiser that a layer belongs to; the prefix of the only one is empty."""
    return next(name for name in denoisers if f"{path}.".startswith(f"{name}." * bool(name)))
