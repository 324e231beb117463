"""What samples are made of: prompts from files, class labels of all classes or at random."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ..checks import check_count
from ..errors import FileFormatError
from ..files.document import Value, parse_json


def read_prompts(path: str | os.PathLike[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Prompts from a file.

    Args:
        path: A text file with a prompt a line; or a JSON file with a list of prompts, or with an
            object of names and prompts.

    Returns:
        The prompts, and their names if the file has some: those of the files to be written, for
        example the numbers of AudioCaps.

    Raises:
        FileFormatError: If the file holds no prompts, or an empty one.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder, "prompts.json")
        ...     _ = file.write_text('{"97151": "a dog barks", "12534": "rain"}')
        ...     read_prompts(file)
        (('a dog barks', 'rain'), ('97151', '12534'))
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise FileFormatError(f"there is no file of prompts '{path}'.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise FileFormatError(f"'{path}' is no text file ({error}).") from error
    names: tuple[str, ...] = ()
    if file.suffix.lower() == ".json":
        document = parse_json(text, str(path))
        if isinstance(document.raw, dict):
            named = document.dict_of(Value.text)
            names, prompts = tuple(named), tuple(named.values())
        else:
            prompts = tuple(document.list_of(Value.text))
    else:
        prompts = tuple(line.strip() for line in text.splitlines() if line.strip())
    empty = [i for i, prompt in enumerate(prompts) if not prompt.strip()]
    if empty or not prompts:
        problem = f"prompt {empty[0]} is empty" if empty else "there are no prompts in it"
        raise FileFormatError(f"'{path}': {problem}.")
    return prompts, names


def random_classes(num_samples: int, num_classes: int, seed: int) -> tuple[int, ...]:
    """Class labels at random, as ADM draws them; the same for the same seed.

    Args:
        num_samples: How many.
        num_classes: Labels are below this.
        seed: Of the draw.

    Returns:
        A label for each sample.

    Raises:
        InvalidArgumentError: If an argument is too small.

    Example:
        >>> random_classes(6, 10, seed=0) == random_classes(6, 10, seed=0)
        True
    """
    check_count("num_samples", num_samples, least=1)
    check_count("num_classes", num_classes, least=1)
    check_count("seed", seed, least=0)
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(num_classes, (num_samples,), generator=generator).tolist())
