"""What the audio scripts take over from the image demo's training, with folders of their own."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "image"))

from common import Run as Run
from common import parser as _parser
from common import random_rows as random_rows
from common import update_average as update_average

RUNS = Path("runs/audio")
FOLDER = Path("src/smoothcache/demo/tones-dit")


def parser(
    description: str | None, *, steps: int, batch: int, lr: float, out: str
) -> argparse.ArgumentParser:
    """The options common to all scripts, with `runs/audio` as the place of the runs."""
    options = _parser(description, steps=steps, batch=batch, lr=lr, out=out)
    options.set_defaults(out=RUNS / out)
    return options
