"""Fragments of HTML that show results in a notebook and in a report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

STYLE = """
.sc{font:14px/1.45 system-ui,sans-serif;max-width:60rem}
.sc .sc-muted{opacity:.75}
.sc .sc-scroll{overflow-x:auto}
.sc table{border-collapse:collapse;font-variant-numeric:tabular-nums}
.sc th,.sc td{padding:.2rem .6rem;text-align:right;white-space:nowrap}
.sc th:first-child,.sc td:first-child{text-align:left}
.sc tr+tr td{border-top:1px solid rgba(128,128,128,.3)}
.sc-row{display:grid;grid-template-columns:minmax(6.5rem,11rem) 1fr 4.5rem;gap:.25rem .75rem;
align-items:center;margin:.25rem 0}
.sc-row svg{width:100%;height:1.25rem;display:block}
.sc-row .sc-count{text-align:right;font-variant-numeric:tabular-nums}
.sc-on{fill:#0072b2}.sc-off{fill:#d5e3ee}
.sc-key{display:flex;gap:1.2rem;flex-wrap:wrap;margin:.3rem 0 .6rem}
.sc-key svg{width:.9rem;height:.9rem;vertical-align:-.1rem;margin-right:.35rem}
@media (prefers-color-scheme:dark){.sc-on{fill:#6cb6ff}.sc-off{fill:#2b3a48}}
"""
"""Of all fragments."""


def fragment(title: str, *parts: str) -> str:
    """A fragment that brings its style along, for a notebook.

    >>> fragment("<x>", "<p>y</p>").endswith('<strong>&lt;x&gt;</strong><p>y</p></div>')
    True

    Args:
        title: Text, which is escaped.
        parts: HTML.
    """
    return f'<style>{STYLE}</style><div class="sc"><strong>{escape(title)}</strong>' + (
        "".join(parts) + "</div>"
    )


def paragraph(text: str) -> str:
    """A paragraph of text, which is escaped."""
    return f'<p class="sc-muted">{escape(text)}</p>'


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of texts, which are escaped."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return (
        f'<div class="sc-scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def attribute(text: str) -> str:
    """Text for between the quotes of an attribute."""
    return escape(text, quote=True)
