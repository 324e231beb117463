"""Small checks of arguments, and the wording that error messages share."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from numbers import Integral, Real
from typing import Any

from .errors import InvalidArgumentError


def check_count(name: str, value: object, *, least: int) -> int:
    """The argument as an int, if it is a whole number of at least ``least`` (True is no number).

    Raises:
        InvalidArgumentError: If it is not.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise InvalidArgumentError(f"{name} must be an integer of at least {least}, got {value!r}.")
    return int(value)


def check_number(name: str, value: object) -> float:
    """The argument as a float, if it is a finite real number (True is no number).

    Raises:
        InvalidArgumentError: If it is not.
    """
    if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
        raise InvalidArgumentError(f"{name} must be a finite number, got {value!r}.")
    return float(value)


def check_texts(name: str, value: Iterable[tuple[object, object]]) -> dict[str, str]:
    """The items as a dict, if both halves of each are strings.

    Raises:
        InvalidArgumentError: If one is not.
    """
    texts: dict[str, str] = {}
    for key, text in value:
        if not isinstance(key, str) or not isinstance(text, str):
            raise InvalidArgumentError(f"{name} maps strings to strings, got {key!r}: {text!r}.")
        texts[key] = text
    return texts


def listed(items: Iterable[object], limit: int = 5) -> str:
    """The items in a sentence, at most ``limit`` of them.

    >>> listed(["attn", "ffn"])
    "'attn', 'ffn'"
    >>> listed(range(9), limit=2)
    '0, 1 and 7 more'
    """
    words = [repr(item) for item in items]
    rest = len(words) - limit
    return ", ".join(words[:limit]) + (f" and {rest} more" if rest > 0 else "")


def takes_keyword(function: Callable[..., Any], name: str) -> bool:
    """Returns whether a function has a parameter of this name; ``**kwargs`` does not count."""
    try:
        return name in inspect.signature(function).parameters
    except (TypeError, ValueError):  # a builtin without a signature
        return False
