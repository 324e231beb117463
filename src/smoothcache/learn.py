"""Learning-to-Cache: trains, through the frozen model, which layers to compute at which steps."""

from __future__ import annotations

import datetime
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from tqdm.auto import tqdm

from ._attach import Attachment
from ._checks import check_count, check_number, listed
from ._intercept import Handler
from ._reuse import taken_apart
from ._routed import RoutedLayer
from ._training import RouterTraining
from .calibration import Calibration
from .clock import Tick
from .denoisers import find_denoisers, noise_scheduler, warn_of_randomness
from .errors import CalibrationError, InvalidArgumentError, ScheduleMismatchError
from .layers import identify, is_residual, layer_modules
from .predictors import PREDICTORS
from .routers import Routers
from .version import __version__


def learn_routers(
    model: Any,
    sample: Callable[[int], Any],
    calibration: Calibration,
    *,
    compute: float | None = None,
    penalty: float | None = None,
    interval: int = 2,
    predictor: str = "hold",
    num_samples: int = 10,
    epochs: int = 3,
    learning_rate: float = 0.3,
    seed: int = 0,
    progress: bool = True,
) -> Routers:
    """Trains a router for each layer and step: how much of the layer is worth computing there.

    Unlike everything else here this is **not training-free**: it takes gradients through the
    model. The model itself is frozen and comes out bit for bit as it was; its parameters get no
    gradient. At every ``interval``-th step all is computed. At a step between, the denoiser runs
    twice on the same input: as it is, which is what the sampler goes on with, so that the samples
    come out as they would without this; and with every layer's output replaced by beta * computed
    + (1 - beta) * reused. The routers descend the squared error of the second output relative to
    the first, plus the price of what is computed: price * sum of beta * MACs of the layer.

    Args:
        model: A diffusers pipeline (all of its denoisers) or any module.
        sample: ``sample(i)`` runs generation number i, as for ``calibrate``. It must not run under
            ``torch.inference_mode()``; ``torch.no_grad()`` is fine.
        calibration: What ``calibrate`` measured: gives the layers, their costs and the steps.
        compute: The fraction of the uncached MACs to train for, in (0, 1]. After every generation
            all routers are shifted alike to stand for just that; the price is the one at which as
            much gains by being computed more as by being computed less.
        penalty: Instead, as in the paper: a fixed price (lambda), in squared relative error of
            the denoiser's output for computing all layers at a step.
        interval: Steps from one that computes everything to the next; 2 in the paper. Budgets
            below a half need more.
        predictor: How reused values are made, one in ``PREDICTORS`` over the step; "hold" in the
            paper.
        num_samples: How many generations to train on: sample(0), sample(1), ...
        epochs: How often to go through them.
        learning_rate: Of Adam, on the logits of beta.
        seed: Of the order of the samples. The same seed gives the same routers.
        progress: Whether to show a progress bar, with the error of the denoiser's output under
            the routers and the compute that they stand for.

    Returns:
        The routers; ``plan_learned`` makes a schedule of them.

    Raises:
        InvalidArgumentError: If an argument has no sensible value, not exactly one of compute and
            penalty is given, no routers could be as cheap as asked, or a layer of the calibration
            is a whole block or denoiser.
        ScheduleMismatchError: If the calibration is of another model.
        CalibrationError: If ``sample`` never runs the model, or another number of steps, or where
            no gradients can be taken.

    Source: Ma et al., "Learning-to-Cache", arXiv 2406.01733. Ours are: the error relative to the
    output, so that a penalty means the same for every model; layers priced by their MACs instead
    of alike; training on the sampler's own trajectory instead of noised data; one step of descent
    a generation; and budgets, other intervals and other predictors.

    Example:
        >>> import torch
        >>> from diffusers import DiTTransformer2DModel
        >>> from smoothcache import calibrate, plan_learned
        >>> model = DiTTransformer2DModel(
        ...     num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2,
        ...     sample_size=8,
        ... ).eval()
        >>> @torch.no_grad()
        ... def sample(i):
        ...     x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(i))
        ...     for t in (900, 700, 500, 300):
        ...         x = x - 0.1 * model(x, torch.tensor([t]), torch.tensor([i])).sample
        ...     return x
        >>> calibration = calibrate(model, sample, num_samples=1, max_gap=1, progress=False)
        >>> routers = learn_routers(
        ...     model, sample, calibration, compute=0.75, num_samples=2, epochs=1, progress=False
        ... )
        >>> plan_learned(routers, compute=0.75).compute <= 0.75
        True
    """
    if not callable(sample):
        raise InvalidArgumentError(
            f"sample must be a function of the sample's number, got {type(sample).__name__}"
        )
    check_count("num_samples", num_samples, least=1)
    check_count("epochs", epochs, least=1)
    check_count("seed", seed, least=0)
    over_steps = [name for name, x in PREDICTORS.items() if not x.needs_noise_levels]
    if predictor not in over_steps:
        raise InvalidArgumentError(
            f"routers are learned with a predictor over the step, one of {listed(over_steps, 20)}; "
            f"got {predictor!r}"
        )
    if check_number("learning_rate", learning_rate) <= 0:
        raise InvalidArgumentError(f"learning_rate must be positive, got {learning_rate}")
    if not isinstance(calibration, Calibration):
        raise InvalidArgumentError(
            f"expected a Calibration, got {type(calibration).__name__}; run calibrate, or "
            "Calibration.load a file"
        )
    check_count("interval", interval, least=2)
    _check_model(model, calibration)
    training = RouterTraining(calibration, interval, compute, penalty, learning_rate)
    warn_of_randomness(model)
    order = random.Random(seed)
    session = _Session(model, calibration, training, predictor)
    with (
        tqdm(total=epochs * num_samples, desc="learning", unit="sample", disable=not progress) as b,
        _frozen(model),
        session.attached(),
    ):
        for _ in range(epochs):
            for i in order.sample(range(num_samples), num_samples):
                session.start(i)
                sample(i)
                session.complete()
                b.set_postfix_str(training.progress())
                b.update()
    settings: dict[str, object] = {
        "interval": interval,
        "predictor": predictor,
        "compute": compute,
        "penalty": penalty,
        "num_samples": num_samples,
        "epochs": epochs,
        "learning_rate": learning_rate,
        "seed": seed,
    }
    return session.result(settings)


def _check_model(model: Any, calibration: Calibration) -> None:
    """Refuses what no routers can be trained for."""
    if calibration.model not in (None, identify(model)):
        raise ScheduleMismatchError(
            "the calibration is of another model; calibrate this one and pass that"
        )
    wholes = [x.path for x in calibration.layers if is_residual(x) or x.kind == "model"]
    if wholes:
        raise InvalidArgumentError(
            f"routers mix the outputs of layers, but {listed(wholes)} are whole blocks or "
            'denoisers; calibrate with granularity="layer"'
        )
    for name, denoiser in find_denoisers(model).items():
        if getattr(denoiser, "is_gradient_checkpointing", False):
            raise InvalidArgumentError(
                "gradient checkpointing runs layers again in the backward pass; call "
                f"disable_gradient_checkpointing() of {name or 'the denoiser'} first"
            )
        if any(parameter.is_inference() for parameter in denoiser.parameters()):
            raise InvalidArgumentError(
                "the model was made under torch.inference_mode(), so no gradients pass through "
                "it; load it outside"
            )


@contextmanager
def _frozen(model: Any) -> Iterator[None]:
    """While no parameter takes gradients; those that did, do again afterwards."""
    denoisers = find_denoisers(model).values()
    parameters = [p for denoiser in denoisers for p in denoiser.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


class _Session:
    """The handlers of one training, and what it has seen of the generations."""

    def __init__(
        self, model: Any, calibration: Calibration, training: RouterTraining, predictor: str
    ) -> None:
        self._model = model
        self._calibration = calibration
        self._training = training
        self._predictor = predictor
        self._layers = {layer.path: RoutedLayer(predictor) for layer in calibration.layers}
        self._modules = layer_modules(model, calibration.layers)
        self._timesteps: tuple[float, ...] = ()
        self._sample = self._generations = 0
        self.tick: Tick | None = None
        self.branch: int | None = None

    @contextmanager
    def attached(self) -> Iterator[None]:
        """While the handlers stand in the model."""
        handlers: dict[str, Handler] = dict(self._layers)
        for name in find_denoisers(self._model):
            handlers[name] = _Denoiser(self, name)
        attachment = Attachment(self._model, self._modules, handlers, self)
        self._clock = attachment.clock
        try:
            yield
        finally:
            attachment.remove()

    # ------------------------------------------------------------- what the attachment reports

    def before(
        self, denoiser: str, tick: Tick, branch: int | None, args: tuple[Any, ...], kwargs: Any
    ) -> None:
        """Notes where in the generation a call is."""
        self._generations += tick.starts
        if self._generations > 1:
            raise CalibrationError(
                f"sample({self._sample}) began a second generation; it must run exactly one from "
                "start to end"
            )
        if tick.step >= self._calibration.num_steps:
            raise CalibrationError(
                f"sample({self._sample}) has come to step {tick.step + 1}, but the calibration "
                f"has {self._calibration.num_steps}; calibrate the sampler that is trained on"
            )
        self.tick, self.branch = tick, branch

    def after(self, denoiser: str, tick: Tick) -> None:
        """Ends a call of a denoiser."""

    def outside(self) -> None:
        """Lets a call that is no part of a generation pass."""
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
        """Runs a call of a denoiser, and trains the routers of its step."""
        if torch.is_inference_mode_enabled():
            raise CalibrationError(
                f"sample({self._sample}) runs under torch.inference_mode(), where no gradients "
                "can be taken; use torch.no_grad() instead"
            )
        tick, branch = self.tick, self.branch
        if tick is None or branch is None:
            return forward(*args, **kwargs)
        layers = self._layers_of(name)
        is_free = tick.step % self._training.interval > 0
        if not is_free or not any(layer.has_kept(branch) for layer in layers.values()):
            return self._kept(layers, tick.step, branch, forward, args, kwargs)
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

    def _kept(
        self,
        layers: dict[str, RoutedLayer],
        step: int,
        branch: int,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """A call that computes everything."""
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
        """Runs the denoiser again with mixed layers, and moves the routers of the step."""
        with torch.enable_grad():
            shares = self._training.shares(step)
            for path, layer in layers.items():
                layer.begin(step, branch, shares[self._training.index(path)])
            student = forward(*given[0], **given[1])
            self._end_layers()
            error = _squared_error(student, output)
        mixed = [path for path, layer in layers.items() if layer.mixed]
        self._training.count(passes=3)  # as it is, mixed, and back
        if not mixed:
            return
        if error is None or not error[0].requires_grad:
            raise CalibrationError(
                f"no gradient comes from the denoiser's output to its layers at step {step}; its "
                "forward may run under torch.no_grad(), or compiled for inference"
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
        """Makes sure that a sample was what it should be."""
        if not self._generations:
            raise CalibrationError(
                f"sample({self._sample}) never ran the model; it must run the pipeline or module "
                "that was passed to learn_routers, from start to end"
            )
        self._timesteps = tuple(self._clock.timesteps)
        if len(self._timesteps) != self._calibration.num_steps:
            raise CalibrationError(
                f"sample({self._sample}) ran {len(self._timesteps)} steps, but the calibration has "
                f"{self._calibration.num_steps}; calibrate the sampler that is trained on"
            )
        for layer in self._layers.values():
            layer.forget()
        self._training.end_generation()

    # ---------------------------------------------------------------------------------- result

    def result(self, settings: dict[str, object]) -> Routers:
        """What was learned."""
        values = self._training.values()
        if (values == 1).all():
            raise CalibrationError(
                "the model ran, but none of its layers could be reused at any step; it may be "
                "compiled, or its calls be told apart no more"
            )
        solver = noise_scheduler(self._model)
        told = {name: str(value) for name, value in settings.items() if value is not None}
        return Routers(
            layers=self._calibration.layers,
            values=values,
            interval=self._training.interval,
            timesteps=self._timesteps,
            predictor=self._predictor,
            total_macs=self._calibration.total_macs,
            model=identify(self._model),
            solver=None if solver is None else type(solver).__name__,
            provenance={
                **told,
                "smoothcache": __version__,
                "torch": str(torch.__version__),
                "created": datetime.date.today().isoformat(),
                "price": f"{self._training.price:.4g}",
                "training cost": f"{self._training.cost:.1f} generations",
            },
        )


class _Denoiser:
    """Handler of a denoiser."""

    def __init__(self, session: _Session, name: str) -> None:
        self._session = session
        self._name = name

    def __call__(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        return self._session.run(forward, args, kwargs, self._name)


def _copied(leaf: Any) -> Any:
    """A leaf that shares nothing with the sampler's own; it takes no part in its gradients."""
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


def _squared_error(student: Any, teacher: Any) -> tuple[Tensor, float] | None:
    """The squared distance of two outputs, and the squared norm of the second."""
    pairs = [
        (a.float(), b.detach().float())
        for a, b in zip(taken_apart(student)[0], taken_apart(teacher)[0], strict=True)
        if isinstance(a, Tensor) and a.is_floating_point()
    ]
    if not pairs:
        return None
    squares: Any = sum((a - b).square().sum() for a, b in pairs)
    return squares, float(sum(b.square().sum() for _, b in pairs))
