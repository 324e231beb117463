"""What a measurement was made with: versions, machine, device."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..version import __version__

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "numpy")


def environment(model: Any = None) -> dict[str, str]:
    """Versions and devices, for a report that others are to repeat.

    Args:
        model: A pipeline or a module, whose classes, device and dtype are named as well.

    Returns:
        Name -> value, in the order to show them. No name of a user, a host or a folder is in it.

    Example:
        >>> "torch" in environment()
        True
    """
    found = {"smoothcache": __version__, "Python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    found["system"] = f"{platform.system()} {platform.machine()}"
    threads = torch.get_num_threads()
    found["processor"] = f"{_processor()}, {threads} thread{'s' * (threads != 1)}"
    if torch.cuda.is_available():
        found["accelerator"] = torch.cuda.get_device_name()
        found["CUDA"] = str(torch.version.cuda)
    return found if model is None else {**_of_model(model), **found}


def _of_model(model: Any) -> dict[str, str]:
    found = {"model": type(model).__name__}
    parts = {
        "denoiser": next(
            (x for name in ("transformer", "unet") if (x := getattr(model, name, None))), None
        ),
        "noise scheduler": getattr(model, "scheduler", None),
    }
    found |= {name: type(part).__name__ for name, part in parts.items() if part is not None}
    for name in ("device", "dtype"):
        if (value := getattr(model, name, None)) is not None:
            found[name] = str(value).removeprefix("torch.")
    return found


def _processor() -> str:
    """The name of the processor as the system has it; os.cpu_count() alone says little."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = named[0] if named else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"
