"""Every public name is documented: what it takes, gives and raises, and a page that lists it."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import smoothcache

PACKAGE = Path(smoothcache.__file__).parent
API = Path(__file__).parents[1] / "docs" / "api"
# Rooms that are not meant to be imported by users, and one that is described by its commands.
INTERNAL = {"cli", "demo", "files", "hub", "tracking"}
ROOMS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
MODULES = [*(room for room in ROOMS if room not in INTERNAL), "errors"]
# What the attachment calls on a run.
CALLBACKS = {"Run.before", "Run.after", "Run.outside", "Run.failed"}


def public_names(module: ModuleType) -> dict[str, Any]:
    """What a room offers: the names that it imports from its files, and its own constants."""
    tree = ast.parse(inspect.getsource(module))
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.level and not is_from_another_room(node):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    listed = getattr(module, "__all__", names)
    return {name: getattr(module, name) for name in sorted(listed) if not name.startswith("_")}


def is_from_another_room(node: ast.ImportFrom) -> bool:
    """Whether an import is of what the module itself needs, and not passed on by ``as``."""
    return node.level > 1 and not any(alias.asname for alias in node.names)


EVERYTHING = [
    (room, name, value)
    for room in MODULES
    for name, value in public_names(importlib.import_module(f"smoothcache.{room}")).items()
]


def callables() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Functions, and the public methods of classes, by a name that says where they are."""
    seen: dict[str, Callable[..., Any]] = {}
    for _, name, value in EVERYTHING:
        if inspect.isfunction(value):
            seen[name] = value
        elif inspect.isclass(value):
            for key, member in vars(value).items():
                function = getattr(member, "__func__", member)
                if not key.startswith("_") and inspect.isfunction(function):
                    seen[f"{name}.{key}"] = function
    return iter(item for item in sorted(seen.items()) if item[0] not in CALLBACKS)


CALLABLES = list(callables())


def test_rooms_have_public_names() -> None:
    assert len(EVERYTHING) > 60
    assert len(CALLABLES) > 50


@pytest.mark.parametrize(("name", "function"), CALLABLES, ids=[name for name, _ in CALLABLES])
def test_callables_say_what_they_take_give_and_raise(name: str, function: Any) -> None:
    text = inspect.getdoc(function) or ""
    assert text, f"{name} has no docstring"
    signature = inspect.signature(function)
    parameters = [x for x in signature.parameters if x not in ("self", "cls")]
    described = text.partition("Args:")[2]
    missing = [x for x in parameters if not re.search(rf"^ +\**{x}:", described, re.MULTILINE)]
    assert not missing, f"{name} does not describe {missing} under Args"
    if signature.return_annotation not in ("None", inspect.Signature.empty):
        assert "Returns:" in text or "Yields:" in text, f"{name} does not say what it returns"
    body = ast.walk(ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function)))))
    if any(isinstance(node, ast.Raise) and node.exc for node in body):
        assert "Raises:" in text, f"{name} does not say what it raises"
    if "." not in name:
        assert ">>>" in text, f"{name} has no example"


@pytest.mark.parametrize(
    ("room", "name", "value"), EVERYTHING, ids=[f"{room}.{name}" for room, name, _ in EVERYTHING]
)
def test_names_are_documented_and_listed(room: str, name: str, value: Any) -> None:
    if inspect.isclass(value):
        assert not (value.__doc__ or "").startswith(f"{name}("), f"{name} has no docstring"
        undocumented = [
            key
            for key, member in vars(value).items()
            if isinstance(member, property) and not key.startswith("_") and not member.__doc__
        ]
        assert not undocumented, f"properties of {name} without a docstring: {undocumented}"
    elif not inspect.isfunction(value):
        assert has_text_below(name), f"the constant {name} has no string below it"
    page = (API / f"{room}.md").read_text(encoding="utf-8")
    assert f"smoothcache.{room}.{name}" in documented(page), f"docs/api/{room}.md lacks {name}"
    assert f"[`{name}`][smoothcache.{room}.{name}" in page, f"docs/api/{room}.md does not list it"


def documented(page: str) -> set[str]:
    """What a page documents; a function in a file of its name goes by the name of both."""
    names = re.findall(r"^::: (\S+)$", page, re.MULTILINE)
    return {re.sub(r"\.(\w+)\.\1$", r".\1", name) for name in names}


def has_text_below(name: str) -> bool:
    """Whether a string follows where a constant is assigned, somewhere in the package."""
    pattern = rf'^{name}\b[^\n]* = (?:[^\n]*|.*?\n[)\]}}]+)\n"""'
    return any(
        re.search(pattern, path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
        for path in PACKAGE.rglob("*.py")
    )


def test_names_of_the_package_are_listed() -> None:
    page = (API / "index.md").read_text(encoding="utf-8")
    assert [x for x in public_names(smoothcache) if f"[`{x}`]" not in page] == []


def test_pages_document_nothing_else() -> None:
    known = {f"smoothcache.{room}.{name}" for room, name, _ in EVERYTHING}
    found = [documented(page.read_text(encoding="utf-8")) for page in API.glob("*.md")]
    assert set().union(*found) <= known
