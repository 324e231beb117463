"""Scores images in a separate environment, in which ``external.py`` runs this file by its path.

It imports nothing from smoothcache, and runs on the old Python versions that scorers need.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any, Callable  # noqa: UP035 - for Python 3.8


def image_reward() -> tuple[Callable[[str, str], Any], str]:
    package = importlib.import_module("ImageReward")
    model = package.load("ImageReward-v1.0")
    return lambda image, prompt: model.score(prompt, image), version(package)


def hps_v2() -> tuple[Callable[[str, str], Any], str]:
    package = importlib.import_module("hpsv2")
    return lambda image, prompt: package.score(image, prompt, hps_version="v2.1")[0], version(
        package
    )


def hps_v3() -> tuple[Callable[[str, str], Any], str]:
    package = importlib.import_module("hpsv3")
    model = package.HPSv3RewardInferencer()
    return lambda image, prompt: model.reward(prompts=[prompt], image_paths=[image])[0][0], version(
        package
    )


def vqa_score() -> tuple[Callable[[str, str], Any], str]:
    package = importlib.import_module("t2v_metrics")
    model = package.VQAScore(model="clip-flant5-xxl")
    return lambda image, prompt: model(images=[image], texts=[prompt])[0][0], version(package)


def version(package: Any) -> str:
    return str(getattr(package, "__version__", "of unknown version"))


def main() -> None:
    name, request, answer = sys.argv[1:]
    asked = json.loads(Path(request).read_text(encoding="utf-8"))
    makers = {f.__name__: f for f in (image_reward, hps_v2, hps_v3, vqa_score)}
    score, found = makers[name]()
    pairs = zip(asked["images"], asked["prompts"])  # noqa: B905 - for Python 3.8
    scores = [float(score(image, prompt)) for image, prompt in pairs]
    Path(answer).write_text(json.dumps({"scores": scores, "version": found}), encoding="utf-8")


if __name__ == "__main__":
    # This folder is first on the path, and its modules have names of packages.
    sys.path.pop(0)
    main()
