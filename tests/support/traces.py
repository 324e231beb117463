"""All that a test can see of a model, to tell whether anything of it was altered."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def traces(model: nn.Module) -> dict[str, Any]:
    """Class and attributes of every module; of containers, what they hold, in order."""
    return {
        path: (
            type(module),
            {
                name: list(value.items()) if isinstance(value, dict) else value
                for name, value in vars(module).items()
            },
        )
        for path, module in model.named_modules(remove_duplicate=False)
    }


def assert_same_traces(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Compares by identity, and where that fails by value; names what differs."""
    assert before.keys() == after.keys()
    for path, (kind, attributes) in before.items():
        assert after[path][0] is kind, path
        assert after[path][1].keys() == attributes.keys(), path
        for name, value in attributes.items():
            other = after[path][1][name]
            if isinstance(value, list):
                assert len(value) == len(other), (path, name)
                assert all(map(_is_same, value, other)), (path, name)
            else:
                assert _is_same(value, other), (path, name)


def _is_same(value: Any, other: Any) -> bool:
    if isinstance(value, tuple) and isinstance(other, tuple):
        return len(value) == len(other) and all(map(_is_same, value, other))
    return value is other or bool(value == other)


@contextmanager
def unaltered(model: nn.Module) -> Iterator[None]:
    """Classes, attributes and hooks of all modules are afterwards what they were."""
    before = traces(model)
    yield
    assert_same_traces(before, traces(model))
