"""What the demos of all modalities have in common: how they refuse, and that a search runs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support.tiny_pipeline import build_audio_pipeline, build_clip_pipeline

import smoothcache as sc
from smoothcache.demo import audio, image, video
from smoothcache.diffusers_io.sampler import PipelineSampler
from smoothcache.diffusers_io.solvers import third_order_sde
from smoothcache.errors import MissingPackageError

DEMOS = pytest.mark.parametrize("demo", [image, video, audio])


@DEMOS
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_samples": 0}, "num_samples must be"),
        ({"num_samples": 15}, "must be a multiple of the batch size (10|12|20),"),
        ({"num_steps": 1}, "num_steps must be"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_arguments_are_checked(
    demo: ModuleType, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(sc.InvalidArgumentError, match=message):
        demo.run_demo(tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("demo", "package", "extra"),
    [(video, "transformers", "video"), (video, "PIL", "video"), (audio, "torchsde", "audio"),
     (audio, "transformers", "audio")],
)  # fmt: skip
def test_a_missing_package_is_named_with_its_extra(
    demo: ModuleType, package: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackageError, match=rf"{package}.*'\.\[{extra}\]'"):
        demo.run_demo(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def sounds() -> Any:
    pytest.importorskip("torchsde")
    pipe = build_audio_pipeline()
    pipe.scheduler = third_order_sde(pipe.scheduler)
    return pipe


@pytest.mark.filterwarnings("ignore:Should have t[ab]:UserWarning")
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize(
    ("build", "prompt", "solvers"),
    [
        (lambda: build_clip_pipeline(depth=1), "a red circle moving left slowly", True),
        (sounds, "a bell playing a low note twice", False),
    ],
    ids=["clips", "sounds"],
)
def test_a_search_keeps_its_budget(
    build: Callable[[], Any], prompt: str, solvers: bool, joint: bool
) -> None:
    sampler = PipelineSampler(build(), prompts=(prompt,), num_steps=5)
    settings: dict[str, Any] = {"compute": 0.6, "max_cost": 1, "num_samples": 1}
    found = sc.search(
        sampler.pipeline, sampler.sample, joint=joint, num_validation=1, progress=False, **settings
    )
    result = found.result
    assert result is not None and result.best.compute <= 0.6 + 1e-9
    others = [row.name for row in result.honest]
    assert any("UniPC" in name for name in others) == solvers, "a stochastic solver stays alone"
    with sc.cached(sampler.pipeline, found) as run:
        sampler.sample(0, result.num_steps, result.scheduler)
    assert run.summary().finished == 1 and run.summary().reused
