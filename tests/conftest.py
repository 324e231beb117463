"""What all tests share."""

import importlib
import sys
from collections.abc import Callable

import pytest
import torch

torch.set_num_threads(1)  # for tensors as small as these, more threads only wait for each other


@pytest.fixture
def run_script(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs a training script, such as "video.train_vae", briefly and in this process."""

    def run(name: str, *options: object) -> None:
        small = ["--batch-size", 2, "--threads", 1, "--device", "cpu", *options]
        monkeypatch.setattr(sys, "argv", [name, *map(str, small)])
        importlib.import_module(f"training.{name}").main()

    return run
