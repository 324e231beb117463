"""How the code is read for the API pages; changes what is rendered, not what is in the code."""

from __future__ import annotations

import re

import griffe

DOCTEST = re.compile(r"^(?P<indent> *)>>> .*(?:\n(?P=indent) *\S.*)*", re.MULTILINE)


def with_fences(text: str) -> str:
    """The text with a fence around every doctest, wherever in a docstring it stands.

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
    """Marks doctests as code."""

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        if obj.docstring:
            obj.docstring.value = with_fences(obj.docstring.value)
