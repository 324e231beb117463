"""The benchmark: counted costs, rows and verdicts, on a toy whose tokens are the image."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.toys import Toy, build
from torch import Tensor, nn

import smoothcache as sc
from smoothcache.comparison.benchmark import Aim, Benchmark, Case, Method, run_benchmark
from smoothcache.comparison.trial import Way
from smoothcache.errors import InvalidArgumentError
from smoothcache.metrics.report import ReportRow
from smoothcache.planners.uniform import plan_uniform

STEPS, BATCH = 8, 2


def images_of(toy: Toy, seed: int, steps: int) -> Tensor:
    latents = toy.generate(steps, seed=seed, batch=BATCH, tokens=16)
    return latents.reshape(BATCH, 1, 16, 16).sigmoid()


def case_of(toy: Toy, **settings: Any) -> Case:
    def sample(toy: Any, i: int, num_inference_steps: int = STEPS, scheduler: Any = None) -> Tensor:
        return images_of(toy, i, num_inference_steps)

    def training(toy: Any, i: int, num_inference_steps: int = STEPS) -> Tensor:
        return images_of(toy, 1000 + i, num_inference_steps)

    return Case("toy", toy, sample, training, STEPS, **settings)


@pytest.fixture(scope="module")
def toy() -> Toy:
    return build("single")


@pytest.fixture(scope="module")
def case(toy: Toy) -> Case:
    return case_of(toy, scores={"frechet_distance": lambda images: float(len(images))})


@pytest.fixture(scope="module")
def result(toy: Toy, case: Case) -> Benchmark:
    every_second = sc.Schedule.uniform(toy, STEPS, 2)
    everything = sc.Schedule.uniform(toy, STEPS, 1)

    def broken() -> Way:
        raise RuntimeError("no such\n  model")

    def breaks_later(i: int) -> Tensor:
        return images_of(toy, i, STEPS) if i == 0 else torch.zeros(1, 1, 16, 16)

    methods = [
        Method("all", "uniform", lambda: case.under(everything)),
        Method("every 2nd", "uniform", lambda: case.under(every_second, note="half of it")),
        Method("4 steps", "fewer steps", lambda: case.plain(4)),
        Method("broken", "rival", broken),
        Method("breaks later", "rival", lambda: Way(breaks_later, (toy,), STEPS)),
        Method("elsewhere", "rival", lambda: Way(lambda i: images_of(toy, i, 4), (), STEPS)),
    ]
    return run_benchmark(case, methods, num_generations=3, progress=False)


def row(result: Benchmark, name: str) -> ReportRow:
    return next(row for row in result.rows if row.name == name)


def test_rows_hold_what_was_counted(toy: Toy, case: Case, result: Benchmark) -> None:
    names = [row.name for row in result.rows]
    assert names == ["uncached", "all", "every 2nd", "4 steps"]
    assert row(result, "uncached").compute == row(result, "all").compute == 1
    assert row(result, "4 steps").compute == 0.5
    calibration = sc.calibrate(toy, lambda i: case.sample(toy, i), 1, 1, progress=False)
    planned = plan_uniform(calibration, interval=2).compute
    assert row(result, "every 2nd").compute == pytest.approx(planned)
    assert [row.steps for row in result.rows] == [8, 8, 8, 4]


def test_rows_hold_quality_with_its_interval(result: Benchmark) -> None:
    uncached, every, half = (row(result, x) for x in ("uncached", "all", "every 2nd"))
    assert uncached.psnr == every.psnr == math.inf and "psnr" not in every.margins
    assert half.psnr is not None and half.psnr < math.inf and half.margins["psnr"] > 0
    values = result.values["every 2nd"]["psnr"]
    assert len(values) == 3 * BATCH and half.psnr == pytest.approx(float(values.mean()))
    assert uncached.converged_psnr is not None and uncached.converged_psnr < math.inf
    assert half.frechet_distance == 3 * BATCH, "scores see all samples of a row"
    assert half.time is not None and half.time > 0
    assert uncached.peak_bytes == 0 and half.peak_bytes and half.peak_bytes > 0


def test_what_does_not_run_is_listed_with_its_error(result: Benchmark) -> None:
    assert set(result.failures) == {"broken", "breaks later", "elsewhere"}
    assert result.failures["broken"] == "RuntimeError: no such model"
    assert "[1, 1, 16, 16]" in result.failures["breaks later"]
    assert "did not run the model" in result.failures["elsewhere"]
    text = str(result.report())
    assert "broken did not run: RuntimeError" in text and "every 2nd: half of it" in text


def test_what_depends_on_the_input_is_counted_in_every_generation(toy: Toy, case: Case) -> None:
    def sample(i: int) -> Tensor:
        return images_of(toy, i, 2 * (i + 1))

    methods = [Method("varies", "rival", lambda: Way(sample, (toy,), STEPS, varies=True))]
    result = run_benchmark(case, methods, num_generations=3, converged=False, progress=False)
    assert row(result, "varies").compute == pytest.approx((2 + 4 + 6) / 3 / STEPS)
    assert row(result, "varies").converged_psnr is None


class Keeping(nn.Module):
    """Keeps what it was given in its last calls, and adds to a count that is never reset."""

    def __init__(self, toy: Toy) -> None:
        super().__init__()
        self.toy = toy
        self.kept: list[Tensor] = []
        self.runs = 0

    def sample(self, i: int) -> Tensor:
        self.runs += 1
        with torch.no_grad():
            self.kept = []
            handle = self.toy.register_forward_hook(self._keep)
            images = images_of(self.toy, i, STEPS)
            handle.remove()
        return (images * (1 - 0.01 * self.runs)).clamp(0, 1)

    def _keep(self, *_: Any) -> None:
        self.kept = [*self.kept, torch.zeros(1000)][-5:]


def test_state_and_memory_of_foreign_caches_are_found_out(toy: Toy, case: Case) -> None:
    keeping = Keeping(toy)
    methods = [Method("keeping", "rival", lambda: Way(keeping.sample, (toy,), STEPS))]
    result = run_benchmark(case, methods, num_generations=2, converged=False, progress=False)
    assert result.notes == {"keeping": "run twice, a generation gave two results"}
    peak = row(result, "keeping").peak_bytes
    assert peak is not None and 4 * 4000 <= peak <= 6 * 4000


def test_one_generation_is_enough(toy: Toy, case: Case) -> None:
    methods = [Method("4 steps", "fewer", lambda: case.plain(4))]
    result = run_benchmark(case, methods, converged=False, progress=False)
    assert row(result, "4 steps").time is not None and not row(result, "4 steps").margins.get(
        "time"
    )


def test_names_must_differ(case: Case) -> None:
    same = [Method("a", "x", case.plain), Method("a", "x", case.plain)]
    with pytest.raises(InvalidArgumentError, match="'a' come twice"):
        run_benchmark(case, same, progress=False)
    with pytest.raises(InvalidArgumentError, match="'uncached' come twice"):
        run_benchmark(case, [Method("uncached", "x", case.plain)], progress=False)


ROWS = (
    ReportRow("uncached", "uncached", compute=1.0, psnr=math.inf),
    ReportRow("ours, cheap", "search", compute=0.2, psnr=30.0, frechet_distance=5.0),
    ReportRow("ours", "search", compute=0.4, psnr=38.0, frechet_distance=3.0),
    ReportRow("joint", "joint", compute=0.2, psnr=50.0, frechet_distance=2.0),
    ReportRow("rival, cheap", "rival", compute=0.2, psnr=29.0, frechet_distance=4.0),
    ReportRow("rival", "rival", compute=0.4, psnr=36.0, frechet_distance=6.0),
    ReportRow("rival, dear", "rival", compute=0.41, psnr=60.0, frechet_distance=1.0),
)
VALUES = {
    row.name: {} if row.psnr == math.inf else {"psnr": row.psnr + torch.tensor([0.0, -1.0, 1.0])}
    for row in ROWS
}
RESULT = Benchmark("made up", ROWS, {}, {}, VALUES)  # type: ignore[arg-type]


def test_the_best_of_ours_meets_the_best_rival_of_equal_or_lower_cost() -> None:
    aim = Aim("psnr", ("search",), apart=("joint",), margin={0.2: 1.5})
    first, second = RESULT.verdicts((0.4, 0.2), [aim])
    assert (first.own, first.rival) == (ROWS[2], ROWS[5]) and first.is_met
    assert first.gain == pytest.approx(2) and first.margin == pytest.approx(0, abs=1e-6)
    assert (second.own, second.rival) == (ROWS[1], ROWS[4])
    assert second.gain == pytest.approx(1) and second.is_met is False, "1.5 dB are wanted"


def test_less_is_better_for_distances() -> None:
    (verdict,) = RESULT.verdicts((0.4,), [Aim("frechet_distance", ("search",), apart=("joint",))])
    assert (verdict.own, verdict.rival) == (ROWS[2], ROWS[4])
    assert verdict.gain == pytest.approx(1) and verdict.is_met and verdict.margin is None


def test_families_are_faced_unless_they_are_kept_apart() -> None:
    (verdict,) = RESULT.verdicts((0.4,), [Aim("psnr", ("search",))])
    assert verdict.rival == ROWS[3] and verdict.is_met is False


def test_nothing_to_compare_is_no_verdict() -> None:
    (verdict,) = RESULT.verdicts((0.1,), [Aim("psnr", ("search",))])
    assert verdict.is_met is None and verdict.own is None and verdict.rival is None


@pytest.mark.parametrize("granularity", ["block", "model"])
def test_schedules_of_any_granularity_are_counted(toy: Toy, case: Case, granularity: Any) -> None:
    coarse = sc.Schedule.uniform(toy, STEPS, 4, granularity=granularity)
    methods = [Method("coarse", "uniform", lambda: case.under(coarse))]
    result = run_benchmark(case, methods, converged=False, progress=False)
    assert not result.failures
    compute = result.rows[1].compute
    assert compute is not None and 1 / 4 <= compute < 1 / 2
