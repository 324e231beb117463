"""A plain loop over a model and a noise scheduler, timed; and the ways in which the model runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn

from smoothcache.model.costs import MacCounter

from .cases import Case

WAYS = ("eager", "blocks", "whole", "graphs")
"""As it is; its repeated blocks compiled; compiled as a whole; the whole with CUDA graphs."""


class Sampler:
    """Samples one case with explicit Euler, and takes its time.

    Attributes:
        model: With random weights, in bfloat16, on the CPU in float32.
        pipeline: The model with its noise scheduler, which counts the steps, so that nobody has to
            read timesteps in the memory of the device.
        prepare: Called before every sample; a cache that remembers the last one resets there.
        note: What the cache wants said of itself.
    """

    def __init__(self, case: Case, *, tiny: bool, device: str) -> None:
        torch.manual_seed(0)
        config = {**case.full, **case.tiny} if tiny else dict(case.full)
        self.steps = min(case.steps, 6) if tiny and not case.published else case.steps
        self.is_cuda = device.startswith("cuda")
        self._others = torch.cuda.memory_allocated() if self.is_cuda else 0
        dtype = torch.bfloat16 if self.is_cuda else torch.float32
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                self.model: Any = case.build(**config)
        finally:
            torch.set_default_dtype(before)
        self.model.eval().requires_grad_(False)
        self.prepare: Callable[[], object] = lambda: None
        self.note = ""
        scheduler = FlowMatchEulerDiscreteScheduler()
        self.pipeline = SimpleNamespace(
            components={"transformer": self.model, "scheduler": scheduler}, scheduler=scheduler
        )
        self._call = case.call
        self._x = torch.randn(case.small if tiny else case.shape, device=device, dtype=dtype)

    def __call__(self) -> None:
        x, context = self._x, getattr(self.model, "cache_context", None)
        scheduler = self.pipeline.scheduler
        scheduler.set_timesteps(self.steps, device=x.device)
        self.prepare()
        for t in scheduler.timesteps:
            if self.is_cuda:
                torch.compiler.cudagraph_mark_step_begin()
            with context("cond") if context else nullcontext():
                out = self._call(self.model, x, t.expand(len(x)))
            x = scheduler.step(out, t, x, return_dict=False)[0]

    def macs(self) -> int:
        with MacCounter() as counter:
            self()
        return counter.total

    def wait(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()

    def seconds(self) -> float:
        if not self.is_cuda:
            start = time.perf_counter()
            self()
            return time.perf_counter() - start
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000

    def forget_peak(self) -> None:
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        """The most bytes on the device since `forget_peak`, the model included; 0 on the CPU."""
        return torch.cuda.max_memory_allocated() - self._others if self.is_cuda else 0


def compile_in(way: str, model: nn.Module, *, breaks: bool) -> None:
    """Compiles a model in one of `WAYS`.

    Args:
        way: One of them.
        model: Of any codebase.
        breaks: Whether graphs may break, as those of rivals do.
    """
    if way == "blocks":
        for name, part in model.named_children():
            if name.endswith("blocks") and isinstance(part, nn.ModuleList):
                for block in part:
                    block.compile(fullgraph=not breaks)
    elif way != "eager":
        model.compile(fullgraph=not breaks, mode="reduce-overhead" if way == "graphs" else None)
