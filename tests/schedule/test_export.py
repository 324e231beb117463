"""Plans for other runtimes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_pipeline import build_pipeline
from support.toys import build

import smoothcache as sc

OUTPUT = sc.CacheLayer("", kind="model", block="")
STEPS = 6


def whole_steps(pattern: str, **options: Any) -> sc.Schedule:
    row = sc.Row(tuple(x == "#" for x in pattern), **options)
    return sc.Schedule(len(pattern), {"": row}, (OUTPUT,))


def steps_from(compute_bins: list[int], cache_bins: list[int]) -> list[int]:
    """Runs of computed and reused steps in turn, which is how the bins are defined."""
    steps: list[int] = []
    for i, computed in enumerate(compute_bins):
        steps += [1] * computed + [0] * (cache_bins[i] if i < len(cache_bins) else 0)
    return steps


def test_a_mask_and_its_bins() -> None:
    plan = whole_steps("##.#...#").export("cache-dit")
    assert plan.steps_computation_mask == [1, 1, 0, 1, 0, 0, 0, 1]
    assert (plan.compute_bins, plan.cache_bins) == ([2, 1, 1], [1, 3])
    assert plan.cache_config() == {
        "num_inference_steps": 8,
        "steps_computation_mask": plan.steps_computation_mask,
        "steps_computation_policy": "static",
        "max_warmup_steps": 0,
    }
    assert plan.sampling_params()["scm_compute_bins"] == [2, 1, 1]


@given(st.lists(st.booleans(), max_size=60))
def test_bins_are_the_mask(later: list[bool]) -> None:
    plan = whole_steps("#" + "".join(".#"[x] for x in later)).export("cache-dit")
    assert steps_from(plan.compute_bins, plan.cache_bins) == plan.steps_computation_mask
    assert plan.steps_computation_mask == [1, *map(int, later)]


@pytest.mark.parametrize(("predictor", "order"), [("hold", 0), ("taylor", 1), ("taylor2", 2)])
def test_the_order_of_the_predictor(predictor: str, order: int) -> None:
    plan = whole_steps("##..#.", predictor=predictor).export("cache-dit")
    assert plan.taylorseer_order == order


def test_what_a_mask_cannot_express_is_refused() -> None:
    fitted = whole_steps("##.", predictor="fitted", weights=((), (), (2.0, -1.0)))
    gains = whole_steps("##.", predictor="taylor", gains=(1, 1, 0.5))
    row = sc.Row((True, False))
    over_noise = sc.Schedule(
        2, {"": sc.Row((True, False), "taylor-angle")}, (OUTPUT,), noise_levels=(0.9, 0.5)
    )
    two = (sc.CacheLayer("a", "model", "a"), sc.CacheLayer("b", "model", "b"))
    differing = sc.Schedule(2, {"a": row, "b": sc.Row((True, True))}, two)
    layers = sc.Schedule.uniform(build("single"), STEPS, 2)
    unbound = sc.Schedule(2, {"attn": row})
    for schedule, message in (
        (fitted, "fitted weights"),
        (gains, "gains"),
        (over_noise, r"'taylor-angle' runs over the noise level"),
        (differing, r"'?a'?, '?b'? have 2 different rows"),
        (layers, r"reuse of .*ffn.*self_attn.*granularity 'model'"),
        (unbound, r"does not know its layers.*bind"),
    ):
        with pytest.raises(sc.InvalidArgumentError, match=message):
            schedule.export("cache-dit")
    with pytest.raises(sc.InvalidArgumentError, match=r"cache-dit.*'tensorrt'"):
        whole_steps("#.").export("tensorrt")
    assert sc.Schedule(2, {"a": row, "b": row}, two).export("cache-dit").mask == (1, 0)


def test_cache_dit_runs_the_plan() -> None:
    """Its last block runs at the computed steps and at no other; its bins are the same."""
    cache_dit = pytest.importorskip("cache_dit", reason="the extra 'rivals' is not installed")
    pipe = build_pipeline()
    schedule = sc.Schedule.uniform(pipe, STEPS, 2, last=True, granularity="model")
    plan = schedule.export("cache-dit")
    assert plan.steps_computation_mask == cache_dit.steps_mask(
        compute_bins=plan.compute_bins, cache_bins=plan.cache_bins, total_steps=STEPS
    )
    calls: list[int] = []
    steps: list[int] = []
    blocks, model = pipe.transformer.transformer_blocks, pipe.transformer

    def generate() -> torch.Tensor:
        return torch.from_numpy(
            pipe(
                [1],
                num_inference_steps=STEPS,
                generator=torch.Generator().manual_seed(0),
                output_type="np",
            ).images
        )

    plain = generate()
    with sc.cached(pipe, schedule):
        ours = generate()
    last = blocks[-1]
    cache_dit.enable_cache(
        pipe,
        cache_config=cache_dit.DBCacheConfig(
            Fn_compute_blocks=1, Bn_compute_blocks=0, **plan.cache_config()
        ),
    )
    last.register_forward_pre_hook(lambda *_: calls.append(len(steps) - 1))
    model.register_forward_pre_hook(lambda *_: steps.append(1))
    theirs = generate()
    assert len(steps) == STEPS
    assert sorted(set(calls)) == [i for i, computed in enumerate(plan.mask) if computed]
    assert theirs.shape == ours.shape
    assert (theirs - plain).abs().max() <= 2 * (ours - plain).abs().max() + 1e-3
