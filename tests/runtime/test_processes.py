"""Workers that are given an enabled model: by fork as it is, by spawn as the plain one."""

from __future__ import annotations

import multiprocessing
from typing import Any

import pytest
import torch
from support.toys import build

import smoothcache as sc

STEPS = 6


def generate(model: Any, queue: Any) -> None:
    torch.set_num_threads(1)
    with torch.no_grad():
        queue.put(model.generate(STEPS).tolist())


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("how", ["fork", "spawn"])
def test_a_worker_gets_an_enabled_model(how: str) -> None:
    model = build("single", depth=2)
    plain = model.generate(STEPS).tolist()
    context: Any = multiprocessing.get_context(how)
    queue = context.Queue()
    with sc.cached(model, sc.Schedule.uniform(model, STEPS, 2)):
        cached = model.generate(STEPS).tolist()
        worker = context.Process(target=generate, args=(model, queue))
        worker.start()
        result = queue.get(timeout=100)
        worker.join(timeout=20)
        assert model.generate(STEPS).tolist() == cached
    assert worker.exitcode == 0
    assert result == (cached if how == "fork" else plain)
