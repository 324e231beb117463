"""One training run: runs denoiser calls with mixed layers and updates the routers."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..calibration.curves import Calibration
from ..errors import CalibrationError
from ..layers.modules import identify, layer_modules
from ..model.outputs import taken_apart
from ..model.target import Target
from ..tracking.attachment import Attachment
from ..tracking.clock import Tick
from ..tracking.intercept import Handler
from ..tracking.listener import CallListener, CallMode, DenoiserCall
from ..version import __version__
from .routed_layer import RoutedLayer
from .routers import Routers
from .training import RouterTraining


class TrainingSession(CallListener):
    """The handlers of one training run and its state in the current generation."""

    def __init__(
        self, target: Target, calibration: Calibration, training: RouterTraining, predictor: str
    ) -> None:
        self._target = target
        self._calibration = calibration
        self._training = training
        self._predictor = predictor
        self._layers = {layer.path: RoutedLayer(predictor) for layer in calibration.layers}
        self._modules = layer_modules(target, calibration.layers)
        self._timesteps: tuple[float, ...] = ()
        self._sample = self._generations = 0
        self.tick: Tick | None = None
        self.branch: int | None = None

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Attaches the handlers to the model inside a ``with`` block."""
        handlers: dict[str, Handler] = dict(self._layers)
        for name in self._target.denoisers:
            handlers[name] = _Denoiser(self, name)
        attachment = Attachment(self._target, self._modules, handlers, self)
        self._clock = attachment.clock
        try:
            yield
        finally:
            attachment.remove()

    # --------------------------------------------------------------------------- calls

    def before(self, call: DenoiserCall) -> CallMode:
        """Records the step and branch of a call."""
        tick = call.tick
        self._generations += tick.starts
        if self._generations > 1:
            raise CalibrationError(
                f"sample({self._sample}) started a second generation; it must run exactly one from "
                "start to end"
            )
        if tick.step >= self._calibration.num_steps:
            raise CalibrationError(
                f"sample({self._sample}) has reached step {tick.step + 1}, but the calibration has "
                f"{self._calibration.num_steps} steps; calibrate the sampler used for training"
            )
        self.tick, self.branch = tick, call.branch
        return CallMode.UNCOMPILED

    def outside(self) -> None:
        """Ignores a call outside any generation."""
        self.tick = None

    def failed(self) -> None:
        """Ends a call that raised."""
        self._end_layers()

    def _end_layers(self) -> None:
        for layer in self._layers.values():
            layer.end()

    # ------------------------------------------------------------------------ calls of a step

    def run(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], name: str
    ) -> Any:
        """Runs a call of a denoiser and trains the routers of its step."""
        if torch.is_inference_mode_enabled():
            raise CalibrationError(
                f"sample({self._sample}) runs under torch.inference_mode(), which does not support "
                "gradients; use torch.no_grad() instead"
            )
        tick, branch = self.tick, self.branch
        if tick is None or branch is None:
            return forward(*args, **kwargs)
        layers = self._layers_of(name)
        is_free = tick.step % self._training.interval > 0
        if not is_free or not any(layer.has_kept(branch) for layer in layers.values()):
            return self._run_full(layers, tick.step, branch, forward, args, kwargs)
        given = pytree.tree_map(_copied, (args, kwargs))
        output = forward(*args, **kwargs)
        self._train(layers, tick.step, branch, forward, given, output)
        return output

    def _layers_of(self, name: str) -> dict[str, RoutedLayer]:
        return {
            path: layer
            for path, layer in self._layers.items()
            if path.startswith(name and f"{name}.")
        }

    def _run_full(
        self,
        layers: dict[str, RoutedLayer],
        step: int,
        branch: int,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Runs a call that computes everything and keeps the outputs."""
        self._training.count(passes=1)
        for layer in layers.values():
            layer.begin(step, branch)
        output = forward(*args, **kwargs)
        self._end_layers()
        return output

    def _train(
        self,
        layers: dict[str, RoutedLayer],
        step: int,
        branch: int,
        forward: Callable[..., Any],
        given: tuple[tuple[Any, ...], dict[str, Any]],
        output: Any,
    ) -> None:
        """Runs the denoiser again with mixed layers and records the gradients of the routers."""
        with torch.enable_grad():
            shares = self._training.shares(step)
            for path, layer in layers.items():
                layer.begin(step, branch, shares[self._training.index(path)])
            student = forward(*given[0], **given[1])
            self._end_layers()
            error = _squared_error(student, output)
        mixed = [path for path, layer in layers.items() if layer.mixed]
        self._training.count(passes=3)  # unchanged, mixed, backward
        if not mixed:
            return
        if error is None or not error[0].requires_grad:
            raise CalibrationError(
                f"no gradient flows from the denoiser's output to its layers at step {step}; check "
                "that its forward does not disable gradients and is not compiled for inference"
            )
        squares, norm = error
        (slope,) = torch.autograd.grad(squares, [shares])
        self._training.note(step, mixed, slope, float(squares.detach()), norm)

    # --------------------------------------------------------------------------------- samples

    def start(self, i: int) -> None:
        """Prepares for a sample."""
        self._sample, self._generations = i, 0
        self._clock.forget()
        for layer in self._layers.values():
            layer.forget()

    def complete(self) -> None:
        """Validates a finished sample and updates the routers."""
        if not self._generations:
            raise CalibrationError(
                f"sample({self._sample}) never ran the model; it must run the pipeline or module "
                "that was passed to learn_routers, from start to end"
            )
        self._timesteps = tuple(self._clock.timesteps)
        if len(self._timesteps) != self._calibration.num_steps:
            raise CalibrationError(
                f"sample({self._sample}) ran {len(self._timesteps)} steps, but the calibration has "
                f"{self._calibration.num_steps}; calibrate the sampler used for training"
            )
        for layer in self._layers.values():
            layer.forget()
        self._training.end_generation()

    # ---------------------------------------------------------------------------------- result

    def result(self, settings: dict[str, object]) -> Routers:
        """Returns the trained routers."""
        values = self._training.values()
        if (values == 1).all():
            raise CalibrationError(
                "the model ran, but none of its layers could be reused at any step; train the "
                "uncompiled model, and check that the calls of a step can be entries apart"
            )
        entries = {name: str(value) for name, value in settings.items() if value is not None}
        return Routers(
            layers=self._calibration.layers,
            values=values,
            interval=self._training.interval,
            timesteps=self._timesteps,
            predictor=self._predictor,
            total_macs=self._calibration.total_macs,
            model=identify(self._target),
            solver=self._target.solver,
            provenance={
                **entries,
                "smoothcache": __version__,
                "torch": str(torch.__version__),
                "created": datetime.date.today().isoformat(),
                "price": f"{self._training.price:.4g}",
                "training cost": f"{self._training.cost:.1f} generations",
            },
        )


class _Denoiser:
    """Handler of a denoiser."""

    def __init__(self, session: TrainingSession, name: str) -> None:
        self._session = session
        self._name = name

    def __call__(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        return self._session.run(forward, args, kwargs, self._name)


def _copied(leaf: Any) -> Any:
    """Returns a detached copy of a tensor; other values are returned unchanged."""
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


def _squared_error(student: Any, teacher: Any) -> tuple[Tensor, float] | None:
    """Returns the squared distance of two outputs and the squared norm of the second."""
    pairs = [
        (a.float(), b.detach().float())
        for a, b in zip(taken_apart(student)[0], taken_apart(teacher)[0], strict=True)
        if isinstance(a, Tensor) and a.is_floating_point()
    ]
    if not pairs:
        return None
    squares: Any = sum((a - b).square().sum() for a, b in pairs)
    return squares, float(sum(b.square().sum() for _, b in pairs))
