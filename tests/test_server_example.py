"""The server of the examples: every answer is the one made alone, also beside cancelled ones."""

from __future__ import annotations

import asyncio
import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_pipeline import build_pipeline

import smoothcache as sc

pytest.importorskip("fastapi", reason="the extra 'server' is not installed")
httpx = pytest.importorskip("httpx", reason="the extra 'server' is not installed")

STEPS = 4


def make_app(pipe: Any, schedules: Any, num_steps: int) -> Any:
    path = Path(__file__).parents[1] / "examples" / "server.py"
    spec = importlib.util.spec_from_file_location("server_example", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.make_app(pipe, schedules, num_steps)


def alone(pipe: Any, schedule: sc.Schedule, label: int, seed: int) -> bytes:
    with sc.cached(pipe, schedule):
        generator = torch.Generator().manual_seed(seed)
        images = pipe(
            [label], generator=generator, num_inference_steps=STEPS, output_type="np"
        ).images
    return bytes(images.tobytes())


def test_answers_beside_cancelled_ones() -> None:
    pipe = build_pipeline()
    schedules = {
        "exact": sc.Schedule.uniform(pipe, STEPS, 1),
        "fast": sc.Schedule.uniform(pipe, STEPS, 2),
    }
    requests = [(i % 5, i, ("exact", "fast")[i % 2]) for i in range(20)]
    twin = copy.deepcopy(pipe)
    expected = [alone(twin, schedules[speed], label, seed) for label, seed, speed in requests]
    classes = [type(x) for x in pipe.transformer.modules()]

    async def load() -> tuple[list[Any], Any]:
        transport = httpx.ASGITransport(app=make_app(pipe, schedules, STEPS))
        async with httpx.AsyncClient(
            transport=transport, base_url="http://127.0.0.1", timeout=120
        ) as client:
            tasks = [
                asyncio.create_task(
                    client.get(
                        f"/generate/{i}", params={"label": label, "seed": seed, "speed": speed}
                    )
                )
                for i, (label, seed, speed) in enumerate(requests)
            ]
            for i in (7, 13):
                await client.delete(f"/generate/{i}")
            wrong = await client.get("/generate/x", params={"label": 1, "seed": 1, "speed": "odd"})
            return [await task for task in tasks], wrong

    answers, wrong = asyncio.run(load())
    assert wrong.status_code == 422 and "exact, fast" in wrong.text
    for i, answer in enumerate(answers):
        if i in (7, 13):
            assert answer.status_code == 409
        else:
            assert answer.status_code == 200
            assert answer.content == expected[i], i
    assert [type(x) for x in pipe.transformer.modules()] == classes
    assert not any(x._forward_pre_hooks for x in pipe.transformer.modules())
