"""What the tests of acceleration share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.prompt_pipeline import PromptPipeline


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("SMOOTHCACHE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def pipe() -> Iterator[PromptPipeline]:
    """A pipeline that no test may leave altered, whatever is raised in it."""
    pipeline = PromptPipeline()
    before = pipeline.sample(0)
    kept = {name: value for name, value in vars(pipeline).items() if name != "calls"}
    yield pipeline
    assert torch.equal(pipeline.sample(0), before)
    now = {name: value for name, value in vars(pipeline).items() if name != "calls"}
    assert now == kept and "step" not in vars(pipeline.scheduler)
    assert not pipeline.transformer._forward_pre_hooks
