"""Several threads in one process, and several processes that generate together."""

from __future__ import annotations

import copy
import functools
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.reference import STEPS, levels, same, sample, times
from support.toys import TOKENS, TOYS, WIDTH, Toy, build
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import smoothcache as sc

PATIENCE = 30.0  # seconds until a thread or process that waits is a failure
every_toy = pytest.mark.parametrize("toy_name", TOYS)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def often() -> Iterator[None]:
    """Lets threads take turns as often as Python can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def uniform(model: Any, interval: int = 3, **options: Any) -> sc.Schedule:
    return sc.Schedule.uniform(model, STEPS, interval, noise_levels=levels(), **options)


def generate(toy: Toy, **options: Any) -> list[Tensor]:
    with torch.no_grad():  # a mode of one thread only
        return sample(toy, **options)


def alone(toy: Toy, schedule: sc.Schedule, **options: Any) -> list[Tensor]:
    """A generation under a handle of its own, with nothing beside it."""
    with sc.cached(toy, schedule):
        return generate(toy, **options)


def at_once(*tasks: Callable[[], Any]) -> list[Any]:
    """What the tasks return or raise, each in a thread of its own, begun together."""
    barrier = threading.Barrier(len(tasks))

    def begin(task: Callable[[], Any]) -> Any:
        barrier.wait(PATIENCE)
        return task()

    with ThreadPoolExecutor(len(tasks)) as pool:
        futures = [pool.submit(begin, task) for task in tasks]
        return [future.exception(PATIENCE) or future.result() for future in futures]


@every_toy
@pytest.mark.parametrize("granularity", ["auto", "block", "model"])
def test_a_model_and_a_handle_for_each_thread(toy_name: str, granularity: Any, often: None) -> None:
    """Modules of one class, so that the classes made for them are shared by the threads."""
    toys = [build(toy_name, seed, depth=2) for seed in range(2)]
    schedules = [
        uniform(toys[0], 2, granularity=granularity),
        uniform(toys[1], 4, granularity=granularity, predictor="taylor"),
    ]
    expected = [alone(toys[i], schedules[i], seed=i) for i in range(2)]
    classes = [[type(module) for module in toy.modules()] for toy in toys]

    def work(i: int) -> list[Any]:
        results = []
        for _ in range(3):
            with sc.cached(toys[i], schedules[i]) as run:
                results.append(generate(toys[i], seed=i))
            results.append(run.summary())
        return results

    for i, results in enumerate(at_once(lambda: work(0), lambda: work(1))):
        assert isinstance(results, list), results
        assert all(same(got, expected[i]) for got in results[::2])
        assert len({(x.computed, x.reused, x.peak_bytes) for x in results[1::2]}) == 1
        assert all(not x.recomputed and x.finished == 1 for x in results[1::2])
    assert [[type(module) for module in toy.modules()] for toy in toys] == classes


def test_models_of_one_class_begin_and_end_in_many_threads(often: None) -> None:
    """The class made for the class of a module comes and goes in all of them."""

    class Known(Toy):
        pass

    class Unknown(Toy):
        """No class has been made for this one before the threads begin."""

    def work(seed: int) -> bool:
        torch.manual_seed(0)
        toy = copy.deepcopy(master)
        before = [type(module) for module in toy.modules()]
        for repetition in range(8):
            schedule = uniform(toy, 2 + (seed + repetition) % 3)
            with sc.cached(toy, schedule):
                got = generate(toy, seed=seed)
            right = same(got, expected[seed, 2 + (seed + repetition) % 3])
            if not right or [type(module) for module in toy.modules()] != before:
                return False
        return same(generate(toy, seed=seed), plain[seed])

    torch.manual_seed(0)
    master: Toy = Known(depth=1).eval().requires_grad_(False)
    plain = [generate(master, seed=seed) for seed in range(4)]
    expected = {
        (seed, interval): alone(master, uniform(master, interval), seed=seed)
        for seed in range(4)
        for interval in (2, 3, 4)
    }
    weights = master.state_dict()
    master = Unknown(depth=1).eval().requires_grad_(False)
    master.load_state_dict(weights)
    assert at_once(*(lambda seed=seed: work(seed) for seed in range(4))) == [True] * 4  # type: ignore[misc]


def test_calibrating_in_one_thread_and_sampling_in_another(often: None) -> None:
    """What is counted in one thread is not counted in another."""
    mine, other = build("dual", depth=2), build("dual", 1, depth=2)

    def calibrated() -> sc.Calibration:
        with torch.no_grad():
            return sc.calibrate(mine, lambda i: sample(mine, seed=i), 2, progress=False)

    expected, schedule = calibrated(), uniform(other)
    under_schedule = alone(other, schedule)

    def sampled() -> list[list[Tensor]]:
        return [alone(other, schedule) for _ in range(4)]

    calibration, samples = at_once(calibrated, sampled)
    assert all(same(one, under_schedule) for one in samples)
    assert calibration.errors.tobytes() == expected.errors.tobytes()
    assert (calibration.layers, calibration.total_macs) == (expected.layers, expected.total_macs)


class Pipe:
    """As much of a pipeline as is needed: components, and a scheduler that lists its timesteps."""

    def __init__(self, seed: int) -> None:
        self.toy = build("single", seed, depth=2)
        self.scheduler = SimpleNamespace(timesteps=torch.arange(1000).flip(0))
        self.components = {"transformer": self.toy, "scheduler": self.scheduler}

    def __call__(self, seed: int, calls: int = 2, start: int = 0) -> list[Tensor]:
        self.scheduler.timesteps = torch.tensor(times())
        return generate(self.toy, seed=seed, calls=calls, timesteps=times()[start:])


def test_a_pipeline_for_each_thread(often: None) -> None:
    pipes = [Pipe(seed) for seed in range(3)]
    schedules = [uniform(pipe, 2 + i) for i, pipe in enumerate(pipes)]
    expected = []
    for i, (pipe, schedule) in enumerate(zip(pipes, schedules, strict=True)):
        with sc.cached(pipe, schedule):
            expected.append(pipe(i))

    def work(i: int) -> tuple[list[list[Tensor]], sc.Summary]:
        with sc.cached(pipes[i], schedules[i]) as run:
            results = [pipes[i](i) for _ in range(4)]
        return results, run.summary()

    tasks = [lambda i=i: work(i) for i in range(3)]  # type: ignore[misc]
    for i, (results, summary) in enumerate(at_once(*tasks)):
        assert all(same(got, expected[i]) for got in results)
        assert summary.finished == 4 and summary.recomputed == {}
        assert summary.reused == 4 * 2 * schedules[i].reused


@every_toy
def test_enabled_in_one_thread_and_used_in_another(toy_name: str) -> None:
    toy = build(toy_name, depth=2)
    schedule = uniform(toy)
    fresh, plain = alone(toy, schedule), generate(toy)
    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:
        handle = first.submit(sc.enable, toy, schedule).result(PATIENCE)
        assert same(second.submit(generate, toy).result(PATIENCE), fresh)
        assert same(generate(toy), fresh)
        assert same(first.submit(generate, toy).result(PATIENCE), fresh)
        assert second.submit(handle.summary).result(PATIENCE).finished == 3
        second.submit(handle.disable).result(PATIENCE)
    assert handle.summary().recomputed == {}
    assert same(generate(toy), plain)


@every_toy
@pytest.mark.parametrize("calls", [1, 2])
def test_threads_that_take_turns(toy_name: str, calls: int, often: None) -> None:
    """As a server does that has one model and a lock around each generation."""
    toy = build(toy_name, depth=2)
    schedule = uniform(toy)
    fresh = [alone(toy, schedule, seed=seed, calls=calls) for seed in range(3)]
    lock = threading.Lock()
    with sc.cached(toy, schedule) as run:

        def work(seed: int) -> list[list[Tensor]]:
            results = []
            for _ in range(3):
                with lock:
                    results.append(generate(toy, seed=seed, calls=calls))
                time.sleep(0)
            return results

        tasks = [lambda seed=seed: work(seed) for seed in range(3)]  # type: ignore[misc]
        for seed, results in enumerate(at_once(*tasks)):
            assert isinstance(results, list), results
            assert all(same(got, fresh[seed]) for got in results)
    summary = run.summary()
    assert (summary.finished, summary.broken_off) == (9, 0)
    assert summary.recomputed == {}


@pytest.mark.parametrize("same_thread", [True, False], ids=["long-lived", "one for each"])
def test_threads_that_take_turns_from_other_beginnings(same_thread: bool) -> None:
    """As image to image does with another strength."""
    pipe = Pipe(0)
    schedule = uniform(pipe, 4)
    starts = [0, 3, 3, 5, 0, 1]
    fresh = []
    for start in starts:
        with sc.cached(pipe, schedule):
            fresh.append(pipe(1, start=start))
    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:
        with sc.cached(pipe, schedule) as run:
            for i, start in enumerate(starts):
                task = functools.partial(pipe, 1, start=start)
                if same_thread:
                    got = (first, second)[i % 2].submit(task).result(PATIENCE)
                else:
                    (got,) = at_once(task)
                assert isinstance(got, list), got
                assert same(got, fresh[i])
    assert (run.summary().finished, run.summary().broken_off) == (len(starts), 0)


@pytest.mark.parametrize("after_steps", [1, 2, 5])
def test_a_thread_that_broke_off_leaves_the_model_to_the_next(after_steps: int) -> None:
    toy = build("single", depth=2)
    schedule = uniform(toy)
    fresh = alone(toy, schedule, seed=1)
    with sc.cached(toy, schedule) as run, ThreadPoolExecutor(1) as first:
        broken_off = first.submit(generate, toy, timesteps=times()[:after_steps])
        broken_off.result(PATIENCE)
        if after_steps == 1:
            run.reset()  # a lone step could be the first call of two
        assert same(generate(toy, seed=1), fresh)
        assert same(first.submit(generate, toy, seed=1).result(PATIENCE), fresh)
    assert (run.summary().finished, run.summary().broken_off) == (2, 1)


class Script:
    """Lets threads take the steps of their generations in a given order.

    Args:
        order: Names of the threads, one for each step; what comes after it is left to chance.
    """

    def __init__(self, order: str) -> None:
        self._order = list(order)
        self._gone: set[str] = set()
        self._changed = threading.Condition()

    def begin(self, name: str) -> Callable[[int, int], None]:
        def wait(step: int, branch: int) -> None:
            with self._changed:
                if step:
                    self._next()
                assert self._changed.wait_for(lambda: self._is_turn_of(name), PATIENCE)

        return wait

    def leave(self, name: str) -> None:
        with self._changed:
            self._gone.add(name)
            self._next()

    def _next(self) -> None:
        self._order = self._order[1:]
        while self._order and self._order[0] in self._gone:
            self._order.pop(0)
        self._changed.notify_all()

    def _is_turn_of(self, name: str) -> bool:
        return not self._order or self._order[0] == name


def interleaved(toy: Toy, schedule: sc.Schedule, order: str) -> tuple[dict[str, Any], sc.Summary]:
    """What two generations, A and B, return or raise if their steps come in this order."""
    script = Script(order)

    def work(name: str, seed: int) -> list[Tensor]:
        try:
            return generate(toy, seed=seed, begin=script.begin(name))
        finally:
            script.leave(name)

    handle = sc.enable(toy, schedule)
    try:
        a, b = at_once(lambda: work("A", 0), lambda: work("B", 1))
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", sc.SmoothCacheWarning)
            handle.disable()
    return {"A": a, "B": b}, handle.summary()


ORDERS = {
    "in turns": "ABABABABABABABAB",
    "two steps each": "AABBAABBAABBAABB",
    "one step of the other": "AAABAAAAABBBBBBB",
    "one step before": "ABBBBBBBBAAAAAAA",
    "one before its last": "AAAAAAABABBBBBBB",
    "both at their ends": "AAAAAABBBBBBABAB",
}
OVERTAKEN = "BBAAAAABBBBBBAAA"


"""B stands at step 1 while A runs to step 4; that B then turns the time back is no beginning."""


every_order = pytest.mark.parametrize("order", ORDERS.values(), ids=list(ORDERS))


def assert_refused_in_words(error: Any) -> None:
    assert isinstance(error, sc.SmoothCacheError)
    for word in ("two threads", "lock", "copy"):
        assert word in str(error)


@every_order
def test_two_generations_at_once_are_refused(order: str) -> None:
    """At least one of them, in a sentence that says what to do."""
    toy = build("single", depth=2)
    before = [(type(module), dict(vars(module))) for module in toy.modules()]
    results, _ = interleaved(toy, uniform(toy, 4), order)
    errors = [result for result in results.values() if isinstance(result, Exception)]
    assert errors
    for error in errors:
        assert_refused_in_words(error)
    assert [(type(module), dict(vars(module))) for module in toy.modules()] == before


@every_order
def test_what_comes_back_of_two_generations_at_once_is_right(order: str) -> None:
    toy = build("single", depth=2)
    schedule = uniform(toy, 4)
    fresh = {"A": alone(toy, schedule, seed=0), "B": alone(toy, schedule, seed=1)}
    results, summary = interleaved(toy, schedule, order)
    right = [name for name, result in results.items() if isinstance(result, list)]
    for name in right:
        assert same(results[name], fresh[name])
    assert summary.finished == len(right)


def test_a_generation_that_was_overtaken_does_not_go_on() -> None:
    """As it is, both go on under the rows of steps that they are not at, and nothing is said."""
    toy = build("single", depth=2)
    results, _ = interleaved(toy, uniform(toy, 4), OVERTAKEN)
    assert_refused_in_words(results["B"])


@pytest.mark.parametrize("toy_name", [name for name in TOYS if name != "instance-forward"])
def test_two_calls_at_the_same_moment(toy_name: str) -> None:
    """The second is refused while the first is inside, and the first is right."""
    results, fresh = two_calls_at_the_same_moment(toy_name)
    assert same(results["first"], fresh)
    assert_refused_in_words(results["second"])


def test_two_calls_at_the_same_moment_of_a_model_with_a_forward_of_its_own() -> None:
    """Hooks of accelerate and of diffusers put one there, too."""
    results, fresh = two_calls_at_the_same_moment("instance-forward")
    assert same(results["first"], fresh)
    assert_refused_in_words(results["second"])


def two_calls_at_the_same_moment(toy_name: str) -> tuple[dict[str, Any], Tensor]:
    """One call made while another waits in a block; and what such a call gives alone."""
    toy = build(toy_name, depth=2)
    x, t, y = torch.ones(1, TOKENS, WIDTH), torch.tensor([times()[0]]), torch.tensor([0])
    fresh = toy.denoise(x, t, y)
    inside, go_on = threading.Event(), threading.Event()
    waiting = [True]

    def wait(*_: Any) -> None:
        if waiting.pop() if waiting else False:
            inside.set()
            assert go_on.wait(PATIENCE)

    toy.blocks[0].register_forward_pre_hook(wait)

    def call() -> Any:
        with torch.no_grad():
            return toy.denoise(x, t, y)

    handle = sc.enable(toy, uniform(toy))
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(call)
        assert inside.wait(PATIENCE)
        second = pool.submit(call)
        second_result = second.exception(PATIENCE) or second.result()
        go_on.set()
        first_result = first.exception(PATIENCE) or first.result()
    handle.reset()
    handle.disable()
    return {"first": first_result, "second": second_result}, fresh


@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("give", [lambda x: x, lambda x: x.clone()], ids=["as it is", "a copy"])
def test_after_a_refusal_the_model_serves_again(
    calls: int, give: Callable[[Tensor], Tensor]
) -> None:
    toy = build("single", depth=2)
    schedule = uniform(toy)
    fresh = alone(toy, schedule, seed=3, calls=calls, give=give)
    script = Script("ABABABAB")

    def work(name: str) -> list[Tensor]:
        try:
            return generate(toy, begin=script.begin(name), calls=calls, give=give)
        finally:
            script.leave(name)

    with sc.cached(toy, schedule) as run:
        results = at_once(lambda: work("A"), lambda: work("B"))
        assert any(isinstance(result, sc.SmoothCacheError) for result in results)
        run.reset()
        assert run.summary().held_bytes == 0
        assert same(generate(toy, seed=3, calls=calls, give=give), fresh)


COLLECTIVES = (
    *("all_reduce", "reduce", "broadcast", "all_gather", "gather", "scatter", "reduce_scatter"),
    *("all_to_all", "all_to_all_single", "barrier", "send", "recv", "isend", "irecv"),
    *("all_gather_into_tensor", "reduce_scatter_tensor", "batch_isend_irecv", "monitored_barrier"),
    *("all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list"),
)


class Traffic(TorchDispatchMode):
    """Names of what the processes say to each other, as PyTorch sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def decisions_of(toy: Toy) -> tuple[list[str], list[Any]]:
    """What runs inside of the layers from now on: the path of every matrix, and its hooks."""
    ran: list[str] = []
    hooks = [
        module.register_forward_pre_hook(lambda *_, path=path: ran.append(path))
        for path, module in toy.named_modules()
        if isinstance(module, nn.Linear)
    ]
    return ran, hooks


SETTINGS = [
    (toy_name, granularity, predictor, wrapped)
    for toy_name, granularity, predictor in (
        ("single", "auto", "hold"),
        ("dual", "auto", "taylor"),
        ("shared", "block", "hold"),
        ("keyword", "model", "taylor2"),
    )
    for wrapped in (False, True)
]


def of_a_rank(rank: int, wrap: Callable[[nn.Module], nn.Module]) -> list[dict[str, Any]]:
    """Generations of one rank, from inputs of its own: how they end, and what they decided."""
    results = []
    for toy_name, granularity, predictor, wrapped in SETTINGS:
        toy = build(toy_name, depth=2)
        model = wrap(toy.requires_grad_(True)) if wrapped else toy
        caller: Any = toy
        if wrapped:
            caller = SimpleNamespace(denoise=_denoise_of(toy, model))
        ran, hooks = decisions_of(toy)
        schedule = uniform(model, 3, granularity=granularity, predictor=predictor)
        with sc.cached(model, schedule, check_finite=rank == 1) as run:
            latents = generate(caller, seed=rank, batch=1 + rank, give=lambda x: x * 10.0**-rank)
        for hook in hooks:
            hook.remove()
        summary = run.summary()
        results.append(
            {
                "latents": latents,
                "decisions": ran,
                "counts": (summary.computed, summary.reused, dict(summary.recomputed)),
            }
        )
    return results


def _denoise_of(toy: Toy, model: nn.Module) -> Callable[..., Tensor]:
    """The toy's own way to call itself, for a model that wraps it."""

    def denoise(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return type(toy).denoise(model, x, t, y)  # type: ignore[arg-type]

    return denoise


def run_rank(rank: int, size: int, folder: Path) -> None:
    """One process of a group: generates, and notes whatever the processes say to each other."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=size
    )
    calls: list[str] = []

    def noting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return function(*args, **kwargs)

        return noted

    for name in COLLECTIVES:
        if hasattr(dist, name):
            setattr(dist, name, noting(name, getattr(dist, name)))

    def wrap(module: nn.Module) -> nn.Module:
        wrapped = DistributedDataParallel(module)
        traffic.names.clear()
        return wrapped

    with Traffic() as traffic:
        results = of_a_rank(rank, wrap)
        silent = not calls and not traffic.names
        dist.all_reduce(torch.ones(1))
    torch.save(
        {
            "results": results,
            "silent": silent,
            "said": sorted(set(calls + traffic.names)),
        },
        folder / f"{rank}.pt",
    )
    dist.destroy_process_group()


def run_ranks(folder: Path) -> list[dict[str, Any]]:
    """What two processes of one group noted."""
    environment = {
        **os.environ,
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),  # for the helpers of tests
    }
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), "2", str(folder)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=4 * PATIENCE)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0, 0], errors
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this PyTorch has no gloo",
)
def test_ranks_decide_alike_and_say_nothing_to_each_other(tmp_path: Path) -> None:
    """On inputs of their own, of another batch size too; and each gives what one process gives."""
    ranks = run_ranks(tmp_path)
    for noted in ranks:
        assert noted["silent"], noted["said"]
        assert {"all_reduce", "allreduce_"} <= set(noted["said"])  # what the test itself says
    for first, second in zip(ranks[0]["results"], ranks[1]["results"], strict=True):
        assert first["decisions"] == second["decisions"]
        assert first["counts"] == second["counts"]
        assert first["counts"][1] > 0 and not first["counts"][2]
        assert first["latents"][-1].shape != second["latents"][-1].shape
    for rank, noted in enumerate(ranks):
        expected = of_a_rank(rank, lambda module: module)
        for got, one in zip(noted["results"], expected, strict=True):
            assert same(got["latents"], one["latents"])
            assert got["decisions"] == one["decisions"]
            assert got["counts"] == one["counts"]


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
