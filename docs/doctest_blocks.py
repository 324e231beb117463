"""Marks the doctests in docstrings as code, wherever in a docstring they stand."""

from __future__ import annotations

import re

import griffe

DOCTEST = re.compile(
    r"^(?P<indent> *)>>> .*(?:\n(?P=indent)\S.*|\n(?P=indent) +\S.*)*", re.MULTILINE
)


def with_fences(text: str) -> str:
    """The text with a fence around every doctest.

    >>> print(with_fences("Adds.\\n\\n>>> 1 + 1\\n2"))
    Adds.
    <BLANKLINE>
    ```pycon
    >>> 1 + 1
    2
    ```
    """
    return DOCTEST.sub(lambda x: f"{x['indent']}```pycon\n{x[0]}\n{x['indent']}```", text)


class DoctestBlocks(griffe.Extension):
    """Changes what is rendered, not what is in the code."""

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        if obj.docstring:
            obj.docstring.value = with_fences(obj.docstring.value)
