"""Learning-to-Cache: trains routers through the frozen model."""

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
    """Trains a router beta for each layer and step, which decides whether to compute the layer.

    Unlike the rest of the library this is **not training-free**: it takes gradients through the
    model. The model is frozen and unchanged afterwards, and its parameters get no gradient. At
    every ``interval``-th step all layers are computed. At other steps the denoiser runs twice on
    the same input. The first run is unchanged, and the sampler continues with its output, so the
    samples are the same as without training. In the second run every layer returns beta * computed
    + (1 - beta) * reused. Gradient descent on the routers minimises the squared error of the second
    output relative to the first, plus a penalty: price * sum of beta * MACs of the layer.

    Args:
        model: A diffusers pipeline (all of its denoisers) or any module.
        sample: ``sample(i)`` runs generation number i, as for ``calibrate``. It must not run under
            ``torch.inference_mode()``; ``torch.no_grad()`` is fine.
        calibration: Calibration with the layers, their costs and the steps.
        compute: Fraction of the uncached MACs to train for, in (0, 1]. After every generation all
            logits are shifted by the same amount to meet it, and the price is set to the weighted
            median of the routers' gains per MAC.
        penalty: Fixed price (lambda) instead, as in the paper: the cost of computing all layers of
            a step, in squared relative error of the denoiser's output.
        interval: Number of steps between steps that compute everything; 2 in the paper. Budgets
            below a half need a larger interval.
        predictor: Name of a predictor over the step in ``PREDICTORS``; "hold" in the paper.
        num_samples: Number of generations to train on: sample(0), sample(1), ...
        epochs: Number of passes over these generations.
        learning_rate: Learning rate of Adam on the logits of beta.
        seed: Seed of the sample order. The same seed gives the same routers.
        progress: Whether to show a progress bar with the error of the denoiser's output and the
            compute of the routers.

    Returns:
        The routers, from which ``plan_learned`` makes a schedule.

    Raises:
        InvalidArgumentError: If an argument is invalid, not exactly one of compute and penalty is
            given, the budget is too small, or a layer of the calibration is a whole block or
            denoiser.
        ScheduleMismatchError: If the calibration is of another model.
        CalibrationError: If ``sample`` never runs the model, runs another number of steps, or runs
            without gradient support.

    Source: Ma et al., "Learning-to-Cache", arXiv 2406.01733. Changes: the error is relative to the
    output, so that penalties are comparable between models; the penalty of a layer is proportional
    to its MACs; training follows the sampler's own trajectory instead of noised data, with one
    optimizer step per generation; and budgets, other intervals and other predictors.

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
            f"sample must be a function of the sample index, got {type(sample).__name__}"
        )
    check_count("num_samples", num_samples, least=1)
    check_count("epochs", epochs, least=1)
    check_count("seed", seed, least=0)
    over_steps = [name for name, x in PREDICTORS.items() if not x.needs_noise_levels]
    if predictor not in over_steps:
        raise InvalidArgumentError(
            f"routers need a predictor over the step, one of {listed(over_steps, 20)}; got "
            f"{predictor!r}"
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
    """Refuses models and calibrations that routers cannot be trained for."""
    if calibration.model not in (None, identify(target)):
        raise ScheduleMismatchError(
            "the calibration is of another model; calibrate this model and pass the result"
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
                "gradient checkpointing reruns layers in the backward pass; call "
                f"disable_gradient_checkpointing() of {name or 'the denoiser'} first"
            )
        if any(parameter.is_inference() for parameter in denoiser.parameters()):
            raise InvalidArgumentError(
                "the model was created under torch.inference_mode(), so it does not support "
                "gradients; load it outside inference mode"
            )


@contextmanager
def _frozen(target: Target) -> Iterator[None]:
    """Disables gradients of all parameters inside a ``with`` block and restores them afterwards."""
    denoisers = target.denoisers.values()
    parameters = [p for denoiser in denoisers for p in denoiser.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
