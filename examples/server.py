"""Serve one pipeline at two speed-ups: ``uvicorn --app-dir examples --factory server:demo``."""

import asyncio

import torch
from fastapi import FastAPI, HTTPException, Request, Response

import smoothcache


class Cancelled(Exception):
    """Ends a generation that nobody waits for any more."""


def make_app(pipe, schedules, num_steps):
    """Requests wait in one queue, because a model serves one generation at a time."""
    app, turn, cancelled = FastAPI(), asyncio.Lock(), set()

    def generate(label, seed, speed, request_id):
        def stop(*_):
            if request_id in cancelled:
                raise Cancelled

        watch = pipe.transformer.register_forward_pre_hook(stop)
        try:
            with smoothcache.cached(pipe, schedules[speed]):
                seeded = torch.Generator().manual_seed(seed)
                options = {"num_inference_steps": num_steps, "output_type": "np"}
                return pipe([label], generator=seeded, **options).images.tobytes()
        finally:
            watch.remove()

    @app.get("/generate/{request_id}")
    async def answer(request_id: str, request: Request, label: int, seed: int, speed: str):
        if speed not in schedules:
            raise HTTPException(422, f"speed must be one of {', '.join(schedules)}")
        async with turn:
            if await request.is_disconnected():
                raise HTTPException(499, "nobody waits for the answer")
            try:
                pixels = await asyncio.to_thread(generate, label, seed, speed, request_id)
            except Cancelled:
                raise HTTPException(409, "cancelled") from None
            finally:
                cancelled.discard(request_id)
        return Response(pixels, media_type="application/octet-stream")

    @app.delete("/generate/{request_id}")
    async def cancel(request_id: str):
        cancelled.add(request_id)

    return app


def demo():
    """The demo pipeline, exact or with one step of three computed."""
    from smoothcache.demo.image import FOLDER, load_pipeline

    pipe = load_pipeline(FOLDER, dtype=torch.float32)
    uniform = smoothcache.Schedule.uniform
    schedules = {"exact": uniform(pipe, 20, 1), "fast": uniform(pipe, 20, 3)}
    return make_app(pipe, schedules, 20)
