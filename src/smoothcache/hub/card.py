"""The card of a repository: what is in it, what it is for, and what it was not measured for."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

LONGEST, MOST_ROWS = 300, 40  # characters of a text, and rows of a table
SPECIAL = re.compile(r"([\\`*_{}\[\]()#+!|~$:-])")


@dataclass(frozen=True)
class Details:
    """What the one who shares knows, and the file does not say.

    Attributes:
        base_model: ``owner/name`` of the model on the hub; empty if it is not there.
        base_revision: Its revision.
        settings: Name -> value: resolution, dtype, guidance and the like.
        prompts: What was measured on.
        seeds: From which noise, in words.
        command: What made it.
        license: Of the files, as the hub names licences.
    """

    base_model: str = ""
    base_revision: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)
    prompts: Sequence[str] = ()
    seeds: str = ""
    command: str = ""
    license: str = ""


@dataclass(frozen=True)
class Card:
    """What a card says, before it is written down.

    Attributes:
        title: Its heading.
        kind: "schedule" or "calibration"; a tag of the repository.
        facts: Name -> value.
        usage: Python that loads it.
        measured: Heading and rows of a table of what was measured; may be empty.
        limits: Sentences: what it was not measured for.
        details: What the one who shares adds.
    """

    title: str
    kind: str
    facts: Mapping[str, str]
    usage: str
    measured: Sequence[Sequence[str]] = ()
    limits: Sequence[str] = ()
    details: Details = field(default_factory=Details)

    def to_markdown(self) -> str:
        """Markdown with metadata; all texts that come from outside are escaped and bounded."""
        given = self.details
        facts = {
            "base model": given.base_model,
            "revision of the base model": given.base_revision,
            **self.facts,
            **given.settings,
            "seeds": given.seeds,
        }
        rows = [(name, value) for name, value in facts.items() if value]
        parts = [
            self._metadata(),
            f"# {plain(self.title)}",
            "Made with smoothcache, which makes diffusion transformers sample faster by reusing "
            "outputs of layers between steps. The files are data: JSON and safetensors.",
            _table([("", ""), *rows]),
            f"## Use\n\n```python\n{self.usage}\n```",
        ]
        if self.measured:
            parts.append(f"## Measured\n\n{_table(self.measured)}")
        if given.prompts:
            listed = [f"- {plain(prompt)}" for prompt in given.prompts[:MOST_ROWS]]
            rest = len(given.prompts) - len(listed)
            listed += [f"- and {rest} more"] if rest > 0 else []
            parts.append("## Prompts\n\n" + "\n".join(listed))
        if self.limits:
            parts.append("## Not measured\n\n" + "\n".join(f"- {plain(x)}" for x in self.limits))
        if given.command:
            parts.append(f"## Made by\n\n{_code(given.command)}")
        return "\n\n".join(parts) + "\n"

    def _metadata(self) -> str:
        """The block of YAML; every value is a JSON string, which is one of YAML too."""
        given = self.details
        entries: dict[str, str | list[str]] = {
            "library_name": "smoothcache",
            "tags": ["smoothcache", f"smoothcache-{self.kind}", "diffusion", "caching"],
        }
        if given.base_model:
            entries["base_model"] = given.base_model
        if given.license:
            entries["license"] = given.license
        lines = [f"{name}: {json.dumps(value)}" for name, value in entries.items()]
        return "\n".join(["---", *lines, "---"])


def plain(text: str) -> str:
    """Text that Markdown and HTML leave as it is, on one line and not too long.

    >>> plain("<img src=x> [a](b)")
    '&lt;img src=x&gt; \\\\[a\\\\]\\\\(b\\\\)'
    """
    one_line = " ".join(str(text).split())
    if len(one_line) > LONGEST:
        one_line = f"{one_line[:LONGEST]}..."
    return SPECIAL.sub(r"\\\1", escape(one_line, quote=False))


def _table(rows: Sequence[Sequence[str]]) -> str:
    """The first row is the heading."""
    head, *body = [[plain(cell) for cell in row] for row in rows[: MOST_ROWS + 1]]
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _code(text: str) -> str:
    """A block of code that no fence within it ends."""
    text = "".join(x for x in text[: 10 * LONGEST] if x.isprintable() or x == "\n")
    longest = max((len(x) for x in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}bash\n{text}\n{fence}"
