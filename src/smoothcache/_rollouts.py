"""Runs candidates for real, and keeps the books: what came out, what it cost, what is known.

A candidate is a way of sampling: under a schedule or without one, with the sampler's own solver and
number of steps or with others. The processes of a distributed run share the candidates out and
know all results; a journal on disk makes them known to a search that is taken up again.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

from ._files import Value, parse_json
from ._gains import Recorder, Trajectory, fit_gains
from .apply import NEVER_SEEN, cached
from .denoisers import find_denoisers
from .errors import InvalidArgumentError, SmoothCacheWarning
from .predictors import PREDICTORS
from .schedule import Row, Schedule

Objective = Callable[[Any, Any], float]


@dataclass(frozen=True)
class Candidate:
    """One way of sampling.

    Attributes:
        name: How it was made, for people.
        compute: MACs over those of the uncached run.
        schedule: What to run under; None for plain sampling.
        num_steps: Solver steps to ask the sampler for; None for its own number.
        solver: Name of another noise scheduler to ask for; None for its own.
    """

    name: str
    compute: float
    schedule: Schedule | None = None
    num_steps: int | None = None
    solver: str | None = None

    @cached_property
    def key(self) -> str:
        """The same for candidates that do the same."""
        rows = self.schedule.rows if self.schedule else {}
        does = [
            [path, *_prediction(row), "".join("01"[x] for x in row.computed)]
            for path, row in rows.items()
            if not all(row.computed)
        ]
        told = json.dumps([does, self.num_steps, self.solver])
        return hashlib.sha256(told.encode()).hexdigest()[:16]


def _prediction(row: Row) -> tuple[int, str, list[float]]:
    """The order of a row's predictor, or as much of it as the computed steps allow; axis, gains."""
    order = min(PREDICTORS[row.predictor].order, sum(row.computed[: _last_reuse(row)]) - 1)
    if order == 0:
        return 0, "step", []
    return order, PREDICTORS[row.predictor].axis, [round(x, 6) for x in row.gains or ()]


def _last_reuse(row: Row) -> int:
    return max(step for step, is_computed in enumerate(row.computed) if not is_computed)


class Rollouts:
    """Samples as candidates say, and measures how far they end from a reference.

    Args:
        model: What the schedules are for.
        sample: ``sample(i, **options)`` runs generation number i.
        objective: Takes an output and its reference; smaller is better.
        solvers: Noise schedulers that candidates may name.
        journal: Where results are written as they come; None for nowhere.
        settings: What the results depend on; a journal of other settings is refused.
        spent: What has been run before, in uncached generations.
    """

    def __init__(
        self,
        model: Any,
        sample: Callable[..., Any],
        objective: Objective,
        solvers: Mapping[str, Any],
        journal: str | os.PathLike[str] | None,
        settings: Mapping[str, Any],
        spent: float = 0.0,
    ) -> None:
        self._model = model
        self._sample = sample
        self._objective = objective
        self._solvers = solvers
        self._references: dict[tuple[str, int], Any] = {}
        self._trajectories: dict[tuple[str, int], Trajectory] = {}
        self._journal = _Journal(journal, settings)
        self._counted: set[tuple[str, str, int]] = set()  # also if the journal knew it
        self.rollouts = 0
        self.cost = spent

    def set_reference(self, name: str, i: int, candidate: Candidate, *, fitted_to: bool) -> Any:
        """Samples what outputs of generation i are to be compared with, under a name.

        Args:
            name: Of the reference.
            i: Number of the generation.
            candidate: How to sample.
            fitted_to: Whether gains will be fitted to it, for which its latents are kept.
        """
        if fitted_to and len(find_denoisers(self._model)) == 1:
            recorder = Recorder(self._model)
            output, trajectory = recorder.run(self._model, lambda: self._run(candidate, i))
            self._trajectories[name, i] = trajectory
        else:
            output = self._run(candidate, i)
        self._references[name, i] = output
        self.cost += candidate.compute
        if not _is_finite(output):
            steps = candidate.num_steps
            call = f"{i}" if steps is None else f"{i}, num_inference_steps={steps}"
            raise InvalidArgumentError(f"sample({call}) returned NaN or infinity")
        self._journal.confirm((name, "norm", i), _norm(output))
        return output

    def fitted(self, name: str, candidate: Candidate, samples: Sequence[int]) -> Row:
        """The row of a candidate for the whole denoiser, with gains fitted to a reference.

        Each sample costs as much as a rollout of the candidate up to its last reuse.
        """
        if candidate.schedule is None:
            raise InvalidArgumentError(f"{candidate.name!r} has no schedule to fit")
        (row,) = candidate.schedule.rows.values()
        at = (name, candidate.key)
        if at not in self._journal.gains:
            self._journal.put_gains(at, from_first(lambda: self._fit(name, candidate, samples)))
        if (*at, -1) not in self._counted:
            self._counted.add((*at, -1))
            run = sum(row.computed[: _last_reuse(row)]) / sum(row.computed)
            self.cost += candidate.compute * run * len(samples)
            self.rollouts += len(samples)
        return replace(row, gains=tuple(self._journal.gains[at]))

    def _fit(self, name: str, candidate: Candidate, samples: Sequence[int]) -> list[float]:
        wanted = {
            i: (self._trajectories[name, i], _flat(self._references[name, i])) for i in samples
        }
        options = self._options(candidate)
        schedule = candidate.schedule
        if schedule is None:
            return []
        row = fit_gains(self._model, lambda i: self._sample(i, **options), schedule, wanted)
        return list(row.gains or [1.0] * len(row.computed))

    def noise(self, name: str, i: int, candidate: Candidate) -> float:
        """How far apart two runs of a reference end, in relative L2, in the worst process."""
        output = self._run(candidate, i)
        self.rollouts += 1
        self.cost += candidate.compute
        noise = latent_l2(output, self._references[name, i])
        return float(max(_gathered(noise)))

    def distances(self, name: str, runs: Sequence[tuple[Candidate, int]]) -> list[float]:
        """How far candidates end from a reference, each in one generation; the ranks share them."""
        wanted = dict.fromkeys((candidate.key, i) for candidate, i in runs)
        ways = {candidate.key: candidate for candidate, _ in runs}
        seen = {(key, i): (name, key, i) in self._counted for key, i in wanted}
        new = [at for at in wanted if (name, *at) not in self._journal.known]
        rank, size = _rank_and_size()
        mine: dict[tuple[str, str, int], float] = {}
        failure: Exception | None = None
        try:
            for key, i in new[rank::size]:
                output = self._run(ways[key], i)
                for told, reference in self._references_of(i).items():
                    mine[told, key, i] = self._judged(output, reference)
                    if size == 1:
                        self._journal.put((told, key, i), mine[told, key, i])
        except Exception as error:
            if size == 1:
                raise
            failure = error  # the other processes wait for this one
        for results, reason in _gathered((mine, failure)):
            if reason is not None:
                raise reason
            for at, value in results.items():
                self._journal.put(at, value)
        for key, i in (at for at, was_seen in seen.items() if not was_seen):
            self.rollouts += 1
            self.cost += ways[key].compute
            self._counted |= {(told, key, i) for told in self._references_of(i)}
        return [self._journal.known[name, candidate.key, i] for candidate, i in runs]

    def _judged(self, output: Any, reference: Any) -> float:
        """What the objective says; infinite if there is no output, or it is not finite."""
        if output is None or not _is_finite(output):
            return math.inf
        value = self._objective(output, reference)
        try:
            number = float(value)
        except (TypeError, ValueError, RuntimeError):
            number = math.nan
        if math.isnan(number):
            raise InvalidArgumentError(f"objective must give a number, got {value!r}")
        return number

    def _references_of(self, i: int) -> dict[str, Any]:
        return {name: value for (name, at), value in self._references.items() if at == i}

    def _options(self, candidate: Candidate) -> dict[str, Any]:
        options: dict[str, Any] = {}
        if candidate.num_steps is not None:
            options["num_inference_steps"] = candidate.num_steps
        if candidate.solver is not None:
            options["scheduler"] = self._solvers[candidate.solver]
        return options

    def _run(self, candidate: Candidate, i: int) -> Any:
        """The output of a generation; None if a branch began at a step planned for reuse."""
        schedule = candidate.schedule
        with cached(self._model, schedule) if schedule else nullcontext() as run:
            output = self._sample(i, **self._options(candidate))
        if run is not None and (reasons := run.summary().recomputed):
            if set(reasons) == {NEVER_SEEN}:  # guidance began at a step that was to reuse
                return None
            raise InvalidArgumentError(
                f"under {candidate.name!r}, sample({i}) had to compute what was planned for reuse "
                f"({', '.join(reasons)}), so its cost cannot be promised; see run.summary()"
            )
        return taken(output, f"sample({i})")


def taken(output: Any, call: str) -> Any:
    """The tensors of an output, on the CPU.

    Raises:
        InvalidArgumentError: If there is none.
    """
    tensors = [x for x in pytree.tree_leaves(output) if isinstance(x, Tensor)]
    if not tensors:
        raise InvalidArgumentError(
            f"{call} returned {type(output).__name__}; it must return the final tensor (latents or "
            "what is made of them), which is what schedules are judged by"
        )
    tensors = [x.detach().cpu() for x in tensors]
    return tensors[0] if len(tensors) == 1 else tuple(tensors)


def _is_finite(output: Any) -> bool:
    return all(bool(torch.isfinite(x).all()) for x in pytree.tree_leaves(output))


def _flat(output: Any) -> Tensor:
    return torch.cat([x.float().flatten() for x in pytree.tree_leaves(output)])


def _norm(output: Any) -> float:
    return math.sqrt(sum(float(x.double().square().sum()) for x in pytree.tree_leaves(output)))


def latent_l2(output: Any, reference: Any) -> float:
    """``||output - reference||_2 / ||reference||_2`` over all tensors, dimensionless.

    >>> latent_l2(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0]))
    0.1

    Raises:
        InvalidArgumentError: If the two have other shapes.
    """
    outputs, references = pytree.tree_leaves(output), pytree.tree_leaves(reference)
    if [x.shape for x in outputs] != [x.shape for x in references]:
        raise InvalidArgumentError(
            f"sample(i) returned the shapes {[list(x.shape) for x in outputs]}, where "
            f"{[list(x.shape) for x in references]} came before; they must be the same"
        )
    pairs = list(zip(outputs, references, strict=True))
    distance = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
    norm = sum(float(b.double().square().sum()) for _, b in pairs)
    return math.sqrt(distance / norm) if norm else math.sqrt(distance)


def typical_l2(output: Any, reference: Any) -> float:
    """The geometric mean of ``latent_l2`` over the samples of a batch, dimensionless.

    Outputs may be one tensor or several, with the batch as their first dimension. What a mean
    PSNR over samples goes by: a sample that comes out ten times as far counts as two that come
    out three times as far, not as a hundred. Tensors of different first dimensions are one sample.

    >>> x = torch.tensor([[4.0], [1.0]])
    >>> round(typical_l2(torch.tensor([[4.4], [2.0]]), x), 3)
    0.316

    Raises:
        InvalidArgumentError: If the two have other shapes.
    """
    whole = latent_l2(output, reference)
    outputs, references = pytree.tree_leaves(output), pytree.tree_leaves(reference)
    sizes = {len(x) if x.ndim else 0 for x in references}
    if len(sizes) != 1 or 0 in sizes:
        return whole
    samples = range(*sizes)
    apart = [latent_l2([x[i] for x in outputs], [x[i] for x in references]) for i in samples]
    return math.exp(sum(math.log(max(x, 1e-12)) for x in apart) / len(apart))


OBJECTIVES: Mapping[str, Objective] = MappingProxyType(
    {"latent_l2": latent_l2, "typical_l2": typical_l2}
)


class _Journal:
    """Results by (reference, candidate, generation), gains by (reference, candidate), and a file.

    The file is the one that they are written to, if any.
    """

    def __init__(self, path: str | os.PathLike[str] | None, settings: Mapping[str, Any]) -> None:
        self.known: dict[tuple[str, str, int], float] = {}
        self.gains: dict[tuple[str, str], list[float]] = {}
        self._path = None if path is None else Path(path)
        self._head = json.dumps({"format": "smoothcache search", "version": 1, **settings})
        if self._path is not None:
            self.known, self.gains = from_first(lambda: self._read(Path(self._path or "")))

    def confirm(self, at: tuple[str, str, int], value: float) -> None:
        """Notes a value that a search which is taken up again finds as it was.

        Raises:
            InvalidArgumentError: If it does not.
        """
        known = self.known.get(at, value)
        if not math.isclose(known, value, rel_tol=1e-3):
            raise InvalidArgumentError(
                f"the journal '{self._path}' is of another search: sample({at[2]}) ends elsewhere "
                "now, so the weights, the prompts or the sampler are others; remove it, or name "
                "another file"
            )
        self.put(at, value)

    def put(self, at: tuple[str, str, int], value: float) -> None:
        is_new = at not in self.known
        self.known[at] = value
        if is_new and _rank_and_size()[0] == 0:
            self._append(json.dumps([*at, value]))

    def put_gains(self, at: tuple[str, str], gains: list[float]) -> None:
        """Notes the gains that were fitted to a reference for a candidate."""
        self.gains[at] = gains
        if _rank_and_size()[0] == 0:
            self._append(json.dumps([*at, gains]))

    def _read(
        self, path: Path
    ) -> tuple[dict[tuple[str, str, int], float], dict[tuple[str, str], list[float]]]:
        """What the file knows; a new one is begun if there is none."""
        if not path.parent.is_dir():
            raise FileNotFoundError(f"the folder of the journal '{path}' is missing.")
        content = path.read_bytes() if path.is_file() else b""
        if not content:
            self._append(self._head)
            return {}, {}
        head, *lines = content.split(b"\n")
        if head != self._head.encode():
            raise InvalidArgumentError(
                f"the journal '{path}' is of another search (another model, sampler, number of "
                "steps or objective); remove it, or name another file"
            )
        # What follows the last line break is a line that an interruption cut short, or nothing.
        known: dict[tuple[str, str, int], float] = {}
        gains: dict[tuple[str, str], list[float]] = {}
        for number, line in enumerate(lines[:-1], start=2):
            if not line:
                continue
            entry = parse_json(line, f"{path}, line {number}")
            fields = entry.items()
            if len(fields) not in (3, 4):
                raise entry.error(f"expected 3 or 4 entries, got {len(fields)}")
            name, key = fields[0].text(), fields[1].text()
            if len(fields) == 3:
                gains[name, key] = fields[2].list_of(Value.number)
            else:
                known[name, key, fields[2].integer()] = _error_of(fields[3])
        if lines[-1]:
            os.truncate(path, len(content) - len(lines[-1]))
        return known, gains

    def _append(self, line: str) -> None:
        if self._path is None:
            return
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
                file.flush()
        except OSError as error:
            warnings.warn(
                f"the journal '{self._path}' cannot be written ({error}); the search goes on, but "
                "cannot be taken up again",
                SmoothCacheWarning,
                stacklevel=2,
            )
            self._path = None


def _error_of(value: Value) -> float:
    """A distance in a journal, which is infinite where a sample was not finite."""
    return math.inf if value.raw == math.inf else value.number()


def join_processes() -> None:
    """Makes the processes of ``accelerate launch`` or ``torchrun`` one group, if there are more."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group()


def _rank_and_size() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _gathered(mine: Any) -> list[Any]:
    size = _rank_and_size()[1]
    if size == 1:
        return [mine]
    everyone: list[Any] = [None] * size
    dist.all_gather_object(everyone, mine)
    return everyone


def from_first(make: Callable[[], Any]) -> Any:
    """What the first process makes or raises, in every process."""
    made, failure = None, None
    if _rank_and_size()[0] == 0:
        try:
            made = make()
        except Exception as error:
            failure = error
    made, failure = _gathered((made, failure))[0]
    if failure is not None:
        raise failure
    return made


def agreed(value: bool) -> bool:
    """The first process's answer, in every process."""
    return bool(from_first(lambda: value))
