"""Learning-to-Cache: trains, through the frozen model, which layers to compute at which steps."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm

from ..calibration.curves import Calibration
from ..checks import check_count, check_number, listed
from ..errors import InvalidArgumentError, ScheduleMismatchError
from ..layers.layer import is_residual
from ..layers.modules import identify
from ..model.denoisers import warn_of_randomness
from ..model.target import Target
from ..steps.predictors import PREDICTORS
from .routers import Routers
from .session import TrainingSession
from .training import RouterTraining


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
    target = Target.of(model)
    _check_model(target, calibration)
    training = RouterTraining(calibration, interval, compute, penalty, learning_rate)
    warn_of_randomness(target.denoisers)
    order = random.Random(seed)
    session = TrainingSession(target, calibration, training, predictor)
    with (
        tqdm(total=epochs * num_samples, desc="learning", unit="sample", disable=not progress) as b,
        _frozen(target),
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


def _check_model(target: Target, calibration: Calibration) -> None:
    """Refuses what no routers can be trained for."""
    if calibration.model not in (None, identify(target)):
        raise ScheduleMismatchError(
            "the calibration is of another model; calibrate this one and pass that"
        )
    wholes = [x.path for x in calibration.layers if is_residual(x) or x.kind == "model"]
    if wholes:
        raise InvalidArgumentError(
            f"routers mix the outputs of layers, but {listed(wholes)} are whole blocks or "
            'denoisers; calibrate with granularity="layer"'
        )
    for name, denoiser in target.denoisers.items():
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
def _frozen(target: Target) -> Iterator[None]:
    """While no parameter takes gradients; those that did, do again afterwards."""
    denoisers = target.denoisers.values()
    parameters = [p for denoiser in denoisers for p in denoiser.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
