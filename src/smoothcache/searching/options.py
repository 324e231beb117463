"""The settings of a search."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypedDict

from ..checks import check_count, check_number, listed
from ..errors import InvalidArgumentError
from ..schedule.schedule import Schedule
from ..steps.noise_scheduler import solver_stages
from .objectives import OBJECTIVES, Objective


class SearchKeywords(TypedDict, total=False):
    """The fields of ``SearchOptions`` as keywords of ``search``."""

    seconds: float | None
    objective: str | Objective
    joint: bool
    num_samples: int | None
    num_validation: int | None
    max_cost: float | None
    seed: int
    journal: str | os.PathLike[str] | None
    solvers: Mapping[str, Any] | None
    proposals: Sequence[Schedule]
    progress: bool


@dataclass(frozen=True)
class SearchOptions:
    """Settings of ``search`` beyond its target; the defaults suit most models.

    Args:
        seconds: Time limit in seconds, after which the search stops improving; None for none.
        objective: What is minimised. "latent_l2" is the relative L2 distance of the outputs.
            "typical_l2" is its geometric mean over the samples of a batch, which one unusual sample
            does not dominate. A function of an output and its reference returns a number; smaller
            is better.
        joint: Whether to search over solver, number of steps and schedule together, by the
            distance to the converged sample.
        num_samples: Number of training samples: candidates are compared on ``sample(0)``,
            ``sample(1)``, ... None for 2, or for 1 in a joint search, where each sample also needs
            a converged one.
        num_validation: Number of validation samples; only the winner and the baselines are measured
            on them. They follow the training samples, and the samples that weights are fitted to.
            None for as many as training samples.
        max_cost: Cost limit in uncached generations, counting everything that is run. The
            references and the first round of candidates run in any case. None for 20, and for 60
            without trajectories, in a joint search, which takes converged samples, and with
            ``max_error``, which tries several budgets.
        seed: Seed of the order in which moves are tried. The same seed gives the same schedule.
        journal: Path of a file for the results. An interrupted search that is started again with
            the same file continues from it.
        solvers: Noise schedulers by name, for the baselines and for a joint search. They are used
            if ``sample`` takes a ``scheduler``. None for the multistep solvers of diffusers that
            suit the pipeline's own noise scheduler.
        proposals: Further schedules to try, whatever made them, such as ``plan_learned``. Those
            above the budget are skipped. The cost of making them is not counted.
        progress: Whether to show a progress bar.

    Raises:
        InvalidArgumentError: If a value is not as described.

    Example:
        >>> options = SearchOptions(num_samples=3, max_cost=100)
        >>> options.training_samples, options.validation_samples
        (range(0, 3), range(3, 6))
    """

    seconds: float | None = None
    objective: str | Objective = "latent_l2"
    joint: bool = False
    num_samples: int | None = None
    num_validation: int | None = None
    max_cost: float | None = None
    seed: int = 0
    journal: str | os.PathLike[str] | None = None
    solvers: Mapping[str, Any] | None = None
    proposals: Sequence[Schedule] = ()
    progress: bool = True

    def __post_init__(self) -> None:
        if self.seconds is not None and check_number("seconds", self.seconds) <= 0:
            raise InvalidArgumentError(f"seconds must be positive, got {self.seconds}.")
        if self.max_cost is not None and check_number("max_cost", self.max_cost) <= 0:
            raise InvalidArgumentError(f"max_cost must be positive, got {self.max_cost}.")
        if not isinstance(self.joint, bool):
            raise InvalidArgumentError(f"joint must be True or False, got {self.joint!r}.")
        for name in ("num_samples", "num_validation"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), least=1)
        check_count("seed", self.seed, least=0)
        if not isinstance(self.journal, str | os.PathLike | None):
            raise InvalidArgumentError(
                f"journal must be the path of a file, got {type(self.journal).__name__}."
            )
        _check_objective(self.objective)
        _check_solvers(self.solvers)
        object.__setattr__(self, "proposals", _checked_proposals(self.proposals))

    @property
    def measure(self) -> Objective:
        """The objective as a function."""
        return OBJECTIVES[self.objective] if isinstance(self.objective, str) else self.objective

    @property
    def objective_name(self) -> str:
        """The name under which a journal knows the objective."""
        if isinstance(self.objective, str):
            return self.objective
        return str(getattr(self.objective, "__qualname__", type(self.objective).__name__))

    @property
    def training_samples(self) -> range:
        """Numbers of the generations that candidates are compared on."""
        if self.num_samples is None:
            return range(1 if self.joint else 2)
        return range(self.num_samples)

    @property
    def validation_samples(self) -> range:
        """Numbers of the generations that the winner and the baselines are measured on."""
        return self.validation_samples_from(0)

    def validation_samples_from(self, first: int) -> range:
        """The validation samples, if those below a number serve other purposes.

        Args:
            first: The number from which samples are free.

        Returns:
            Numbers of the generations that the winner is measured on.
        """
        training = len(self.training_samples)
        first = max(first, training)
        return range(first, first + (self.num_validation or training))

    def with_keywords(self, keywords: SearchKeywords) -> SearchOptions:
        """These options together with keywords for fields that still have their defaults.

        Args:
            keywords: Name of a field -> its value.

        Returns:
            New options.

        Raises:
            InvalidArgumentError: If these options already have another value for a keyword.
        """
        defaults = {item.name: item.default for item in fields(self)}
        given_twice = [name for name in keywords if getattr(self, name) != defaults[name]]
        if given_twice:
            raise InvalidArgumentError(
                f"{listed(given_twice, 20)} was given both in options and as a keyword; give each "
                "setting once."
            )
        return replace(self, **keywords)


def options_of(options: SearchOptions | None, keywords: SearchKeywords) -> SearchOptions:
    """The options of a call of ``search``.

    Raises:
        TypeError: If a keyword is unknown.
        InvalidArgumentError: If ``options`` are no ``SearchOptions``, a value is not as described,
            or one was given twice.
    """
    known = [item.name for item in fields(SearchOptions)]
    for name in keywords:
        if name not in known:
            raise TypeError(
                f"search() got an unexpected keyword argument {name!r}; beside its named arguments "
                f"it takes the fields of SearchOptions: {', '.join(known)}"
            )
    if options is None:
        return SearchOptions(**keywords)
    if not isinstance(options, SearchOptions):
        raise InvalidArgumentError(
            f"options must be SearchOptions, got {type(options).__name__}; give other settings as "
            "keywords."
        )
    return options.with_keywords(keywords)


def _check_objective(objective: object) -> None:
    is_known = objective in OBJECTIVES if isinstance(objective, str) else callable(objective)
    if not is_known:
        raise InvalidArgumentError(
            f"objective must be a function or one of {', '.join(OBJECTIVES)}, got {objective!r}."
        )


def _check_solvers(solvers: object) -> None:
    if solvers is None:
        return
    if not isinstance(solvers, Mapping):
        raise InvalidArgumentError(
            f"solvers must map names to noise schedulers, got {type(solvers).__name__}."
        )
    for name, solver in solvers.items():
        stages = solver_stages(solver)
        if stages not in (None, 1):
            raise InvalidArgumentError(
                f"the solver {name!r} calls the model {stages} times in a step, but a search "
                "counts one call a step; leave it out"
            )


def _checked_proposals(proposals: object) -> tuple[Schedule, ...]:
    if not isinstance(proposals, Iterable):
        raise InvalidArgumentError(
            f"proposals must be a sequence of schedules, got {type(proposals).__name__}."
        )
    checked = []
    for proposal in proposals:
        if not isinstance(proposal, Schedule) or proposal.layers is None:
            raise InvalidArgumentError(
                "proposals must be schedules that know their layers, got "
                f"{type(proposal).__name__}; bind a published schedule to the layers first"
            )
        checked.append(proposal)
    return tuple(checked)
