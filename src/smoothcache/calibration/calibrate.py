"""Measures the error of reusing each layer while the user's sampler runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from tqdm.auto import tqdm

from ..checks import check_count, takes_keyword
from ..errors import CalibrationError, InvalidArgumentError
from ..layers.find import find_layers
from ..layers.layer import CacheLayer, Granularity
from ..model.denoisers import warn_of_randomness
from ..model.target import Target
from ..processes import (
    from_rank_zero,
    gather_from_all,
    gather_to_zero,
    join_processes,
    on_all_ranks,
    rank_and_size,
)
from .converged import converged_offsets
from .curves import Calibration
from .recording import Keep, TrajectoryObserver
from .session import CalibrationSession, run


def calibrate(
    model: Any,
    sample: Callable[[int], Any],
    num_samples: int = 10,
    max_gap: int = 3,
    *,
    granularity: Granularity = "auto",
    layers: Sequence[CacheLayer] | None = None,
    tokens: int | None = None,
    trajectory: Keep | None = None,
    converged_steps: int | None = None,
    over_ranks: bool = False,
    progress: bool = True,
) -> Calibration:
    """Measures the error of reusing each layer, for every gap and step, on a few samples.

    The model is unchanged, and the samples are the same as without calibration. At most
    ``max_gap`` outputs of each layer are kept (per use, if the denoiser calls the layer several
    times in a step). Errors stay on the device until a sample is complete.

    Args:
        model: A diffusers pipeline (all of its denoisers) or any module.
        sample: ``sample(i)`` runs generation number i, with its own prompt and seed, from start
            to end. Its return value is ignored.
        num_samples: Number of generations in the calibration set.
        max_gap: Largest gap to measure, in steps.
        granularity: Granularity of the layers, as for ``find_layers``. If the first sample shows
            that a block bypasses its layers, the block is measured as a whole and that sample runs
            again.
        layers: Measure exactly these layers; None finds them.
        tokens: Number of tokens of each output to compare, approximately, evenly spaced along the
            second-to-last dimension; None compares all. Saves memory and time on large models.
        trajectory: Whether to record the latents and denoiser outputs of every step, which
            ``plan_trajectory`` and ``fit`` need. They are kept in half precision, two tensors of
            the latents' size per sample and step. "gram" records only inner products, a few
            kilobytes, which suffice for planning; a recording that exceeds one GiB falls back to
            it. Measuring the solver's responses runs ``sample(0)`` a few more times without the
            model. If that fails, the ``no_trajectories`` entry of the provenance gives the reason.
            None, the default, records trajectories for a pipeline, whose extra runs end at the last
            step. For a bare module pass True; its extra runs of ``sample(0)`` run to the end, with
            artificial outputs.
        converged_steps: Number of steps of a converged trajectory, to which
            ``plan_trajectory(target="converged")`` and ``fit(target="converged")`` then plan: each
            sample also runs with so many steps, as ``sample(i, num_inference_steps=...)``. None
            runs none.
        over_ranks: Whether the ranks of ``torchrun`` or ``accelerate launch`` share out the
            samples, each with a whole model of its own; sample i runs in rank i modulo their
            number. All of them return what one process would measure, to the last bit. Not for a
            model whose parts lie in different ranks.
        progress: Whether to show a progress bar.

    Returns:
        Error curves with their spread over the samples, and the cost of each layer. Layers that
        did not run at every step of their denoiser are omitted and therefore always computed; the
        ``left_out`` entry of the provenance lists them. Steps are counted from the first step that
        a sample runs, so image-to-image sampling is calibrated for the steps that it runs.

    Raises:
        InvalidArgumentError: If an argument is invalid.
        LayersNotFoundError: If the model has no layer that could be reused.
        CalibrationError: If ``sample`` never runs the model, runs several generations or a
            varying number of steps, or if a layer's output is not finite.

    Source: arXiv 2411.10510, section 3 (calibration). If guidance runs in several calls per step,
    numerator and denominator are summed over the calls, as over a batch.

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
            f"sample must be a function of the sample index, got {type(sample).__name__}"
        )
    check_count("num_samples", num_samples, least=1)
    check_count("max_gap", max_gap, least=1)
    if tokens is not None:
        check_count("tokens", tokens, least=1)
    target = Target.of(model)
    if trajectory is None:
        trajectory = target.noise_scheduler is not None
    if trajectory not in (True, False, "gram"):
        raise InvalidArgumentError(f"trajectory must be True, False or 'gram', got {trajectory!r}")
    if converged_steps is not None:
        check_count("converged_steps", converged_steps, least=2)
        if not takes_keyword(sample, "num_inference_steps"):
            raise InvalidArgumentError(
                "converged trajectories take more steps than the calibrated ones, so sample must "
                "have the keyword num_inference_steps"
            )
        if trajectory is not True:
            raise InvalidArgumentError("converged_steps needs trajectory=True, with latents")
    warn_of_randomness(target.denoisers)
    found = find_layers(target, granularity=granularity) if layers is None else list(layers)
    _check_layers(found)
    may_take_blocks = layers is None and granularity == "auto"
    if over_ranks:
        join_processes()
        if rank_and_size()[1] > 1:
            work = _Shared(target, sample, max_gap, tokens, trajectory, progress)
            calibration = work.calibrate(found, num_samples, may_take_blocks)
            return _with_converged(calibration, target, sample, converged_steps, over_ranks=True)
    with tqdm(total=num_samples, desc="calibrating", unit="sample", disable=not progress) as bar:
        observer = TrajectoryObserver(target, trajectory)
        session = CalibrationSession(target, found, max_gap, tokens, observer)
        run(session, sample, range(1))
        confirmed = session.confirmed(may_take_blocks=may_take_blocks)
        if _others(confirmed, found):  # the first sample was lost
            session = CalibrationSession(target, confirmed, max_gap, tokens, observer)
            run(session, sample, range(1))
        observer.measure(partial(sample, 0))
        bar.update()
        run(session, sample, range(1, num_samples), bar.update)
    return _with_converged(session.result(), target, sample, converged_steps, over_ranks=False)


def _with_converged(
    calibration: Calibration,
    target: Target,
    sample: Callable[[int], Any],
    num_steps: int | None,
    *,
    over_ranks: bool,
) -> Calibration:
    """Returns the calibration with the offsets of converged trajectories, if they are wanted."""
    if num_steps is None:
        return calibration
    known = calibration.trajectories
    if known is None or not known.has_latents:
        reason = calibration.provenance.get("no_trajectories", "") or "they are too large"
        raise CalibrationError(
            f"converged_steps needs the trajectories of the samples, which are missing: {reason}"
        )
    if num_steps <= calibration.num_steps:
        raise InvalidArgumentError(
            f"converged_steps must exceed the {calibration.num_steps} steps of the samples, got "
            f"{num_steps}"
        )
    rank, size = rank_and_size() if over_ranks else (0, 1)
    own = range(known.num_samples)[rank::size]
    offsets = converged_offsets(target, sample, known, calibration.timesteps, num_steps, own)
    for part in gather_from_all(offsets) if size > 1 else ():
        offsets |= part
    found = tuple(offsets[i] for i in range(known.num_samples))
    provenance = {**calibration.provenance, "converged_steps": str(num_steps)}
    return replace(calibration, trajectories=replace(known, offsets=found), provenance=provenance)


@dataclass(frozen=True)
class _Shared:
    """A calibration whose samples are shared out over ranks.

    Every rank counts and confirms on its own first sample; what rank 0 found holds for all.
    """

    target: Target
    sample: Callable[[int], Any]
    max_gap: int
    tokens: int | None
    trajectory: Keep
    progress: bool

    def calibrate(
        self, found: list[CacheLayer], num_samples: int, may_take_blocks: bool
    ) -> Calibration:
        rank, size = rank_and_size()
        own = range(num_samples)[rank::size]
        first, others = own[:1], own[1:]
        observer = TrajectoryObserver(self.target, self.trajectory, rank)
        session = self._session(found, observer, rank)
        on_all_ranks(lambda: run(session, self.sample, first))
        confirmed = from_rank_zero(lambda: session.confirmed(may_take_blocks=may_take_blocks))
        if _others(confirmed, found):
            session = self._session(confirmed, observer, rank)
            on_all_ranks(lambda: run(session, self.sample, first))
        if rank == 0:
            observer.measure(partial(self.sample, 0))
        solver = gather_from_all((observer.responses, observer.reason) if rank == 0 else None)[0]
        if rank:
            observer.adopt(*solver)
        hidden = not self.progress or rank > 0
        with tqdm(total=len(own), desc="calibrating", unit="sample", disable=hidden) as bar:
            bar.update(len(first))
            on_all_ranks(lambda: run(session, self.sample, others, bar.update))
        parts = gather_to_zero(session.part())

        def joined() -> Calibration:
            session.take(parts[1:])
            return session.result()

        return from_rank_zero(joined)

    def _session(
        self, layers: list[CacheLayer], observer: TrajectoryObserver, first: int
    ) -> CalibrationSession:
        return CalibrationSession(
            self.target, layers, self.max_gap, self.tokens, observer, first=first
        )


def _others(confirmed: Sequence[CacheLayer], found: Sequence[CacheLayer]) -> bool:
    """Whether something is to be measured that was not found at first."""
    return bool({(x.path, x.kind) for x in confirmed} - {(x.path, x.kind) for x in found})


def _check_layers(layers: Sequence[CacheLayer]) -> None:
    """Refuses layers that cannot be measured together."""
    if not layers:
        raise InvalidArgumentError("layers is empty; omit it, or pass the result of find_layers")
    for x in layers:
        for y in layers:
            if x is not y and f"{y.path}.".startswith(x.path and f"{x.path}."):
                raise InvalidArgumentError(
                    f"{y.path!r} is {x.path!r} or inside it; calibrate one of the two"
                )
