"""Arguments of a pipeline's call that are given as text: which there are, and of what type."""

from __future__ import annotations

import difflib
import inspect
import json
import types
from collections.abc import Collection, Iterable
from typing import Any, Union, get_args, get_origin, get_type_hints

from ..checks import listed
from ..errors import InvalidArgumentError

OWN = {
    "prompt": "--prompt",
    "class_labels": "--class-label",
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance-scale",
    "generator": "--seed",
    "image": "--images",
    "control_image": "--images",
}
"""Argument -> the option that sets it."""
NEVER = (
    *("output_type", "return_dict", "latents"),
    *("callback", "callback_steps", "callback_on_step_end", "callback_on_step_end_tensor_inputs"),
)
IMAGE_ARGUMENTS = ("image", "control_image", "conditioning_image", "mask_image")
WORDS = {"True": True, "False": False, "None": None, "true": True, "false": False, "null": None}


def parameters_of(pipeline: Any) -> dict[str, inspect.Parameter]:
    """What the pipeline's call takes, by name."""
    parameters = dict(inspect.signature(type(pipeline).__call__).parameters)
    parameters.pop("self", None)
    return parameters


def image_arguments(pipeline: Any) -> list[str]:
    """The arguments by which a pipeline takes images, the one it starts from first."""
    takes = parameters_of(pipeline)
    return [name for name in IMAGE_ARGUMENTS if name in takes]


def check_name(pipeline: Any, name: str, given: str, among: Collection[str] | None = None) -> None:
    """Refuses an argument that the pipeline's call does not take.

    Args:
        pipeline: Whose call it is.
        name: Of the argument.
        given: The option that asks for it, for the message.
        among: What could have been meant; None for all that can be given as text.

    Raises:
        InvalidArgumentError: If there is none; lists those that there are.
    """
    takes = parameters_of(pipeline)
    if name in takes or any(x.kind is x.VAR_KEYWORD for x in takes.values()):
        return
    hints = _hints(pipeline)
    free = among or [
        x
        for x in takes
        if x not in OWN and x not in NEVER and any(map(_spoken, _values(hints.get(x, str))))
    ]
    close = difflib.get_close_matches(name, free, 3)
    hint = f"did you mean {listed(close)}? " if close else ""
    raise InvalidArgumentError(
        f"{given}: {type(pipeline).__name__} takes no {name!r}; {hint}it takes {listed(free, 40)}"
    )


def call_arguments(
    pipeline: Any, texts: Iterable[str], *, set_elsewhere: Collection[str] = ()
) -> dict[str, Any]:
    """Arguments of a call, each of the type that the pipeline's signature asks for.

    >>> class Pipeline:
    ...     def __call__(self, strength: float = 0.3, sizes: list[int] | None = None): ...
    >>> call_arguments(Pipeline(), ["strength=1", "sizes=[1, 2]"])
    {'strength': 1.0, 'sizes': [1, 2]}

    Args:
        pipeline: Whose call they are for.
        texts: KEY=VALUE each.
        set_elsewhere: Arguments that have options of their own, and are given by these.

    Raises:
        InvalidArgumentError: If one is not of this form, unknown, given twice, set by another
            option, or not of its type.
    """
    hints = _hints(pipeline)
    takes = parameters_of(pipeline)
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        given = f"--call {text}"
        if not equals or not name.isidentifier():
            raise InvalidArgumentError(f"{given}: expected KEY=VALUE, such as strength=0.8")
        if name in OWN:
            raise InvalidArgumentError(f"{given}: '{name}' is set by {OWN[name]}")
        if name in NEVER:
            raise InvalidArgumentError(f"{given}: '{name}' is set by smoothcache")
        check_name(pipeline, name, given)
        if name in found or name in set_elsewhere:
            raise InvalidArgumentError(f"{given}: '{name}' is given twice")
        default = takes[name].default if name in takes else None
        hint = hints.get(name, type(default) if default is not None else Any)
        found[name] = typed(hint, value, given)
    return found


def typed(hint: Any, text: str, given: str) -> Any:
    """A text as a value of a type, which may be a union.

    Args:
        hint: A type, as in a signature.
        text: JSON, a word of Python such as None, or the text itself where the type is one.
        given: Where it stands, for the message.

    Raises:
        InvalidArgumentError: If it is of another type.
    """
    choices = _choices(hint)
    try:
        value = WORDS[text] if text in WORDS else json.loads(text)
    except (ValueError, RecursionError):
        value = text
    for choice in choices:
        fits, converted = _as_type(choice, value)
        if fits:
            return converted
    if str in choices:
        return text
    wanted = [word for choice in choices if (word := _spoken(choice))]
    if not wanted:
        raise InvalidArgumentError(f"{given}: what it takes cannot be given as text ({hint})")
    raise InvalidArgumentError(f"{given}: expected {' or '.join(wanted)}, got {text!r}")


def _hints(pipeline: Any) -> dict[str, Any]:
    try:
        return get_type_hints(type(pipeline).__call__)
    except Exception:  # an annotation can name what is not installed
        return {}


def _choices(hint: Any) -> tuple[Any, ...]:
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(choice for one in get_args(hint) for choice in _choices(one))
    return (hint,)


def _values(hint: Any) -> list[Any]:
    """The choices of a type but None."""
    return [choice for choice in _choices(hint) if choice is not type(None)]


def _as_type(hint: Any, value: Any) -> tuple[bool, Any]:
    """Whether a value is of a type, and the value as it."""
    if hint in (Any, inspect.Parameter.empty, object):
        return True, value
    if hint in (None, type(None)):
        return value is None, None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is float:
        return is_number, float(value) if is_number else value
    if hint is int:
        return is_number and isinstance(value, int), value
    if hint in (bool, str):
        return isinstance(value, hint), value
    origin = get_origin(hint) or hint
    if origin in (list, tuple) and isinstance(value, list):
        return _as_sequence(origin, get_args(hint), value)
    if origin is dict:
        return isinstance(value, dict), value
    return False, value


def _as_sequence(origin: Any, inner: tuple[Any, ...], values: list[Any]) -> tuple[bool, Any]:
    if origin is tuple and inner and Ellipsis not in inner and len(inner) != len(values):
        return False, values
    kinds = (
        inner if origin is tuple and Ellipsis not in inner and inner else inner[:1] * len(values)
    )
    found = []
    for kind, value in zip(kinds or [Any] * len(values), values, strict=True):
        parts = (_as_type(choice, value) for choice in _choices(kind))
        part = next((converted for fits, converted in parts if fits), _as_type)
        if part is _as_type:
            return False, values
        found.append(part)
    return True, origin(found)


def _spoken(hint: Any) -> str:
    """A type in words; empty if no text can be of it."""
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    names[type(None)] = "None"
    if hint in names:
        return names[hint]
    origin = get_origin(hint) or hint
    if origin in (list, tuple):
        return "a list" + (f" of {inner}" if (inner := _inner(hint)) else "")
    return "an object {...}" if origin is dict else ""


def _inner(hint: Any) -> str:
    words = {int: "whole numbers", float: "numbers", str: "texts", bool: "true or false"}
    return next((words[x] for x in get_args(hint) if x in words), "")
