"""Damaged files of every kind: each is refused by name, or means something that saves and loads.

`SMOOTHCACHE_FUZZ=10000` sets how many mutated files of each format are tried; a few hundred are by
default. What was ever found stands in `FOUND`.
"""

from __future__ import annotations

import json
import os
import random
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.made_up import MODEL, calibration_of, layers_of

import smoothcache as sc
from smoothcache.learning.routers import Routers
from smoothcache.searching.journal import Journal as Journal

COUNT = int(os.environ.get("SMOOTHCACHE_FUZZ", "300"))
MOST_SECONDS, MOST_BYTES = 1.0, 100 * 2**20
ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 0.5, -0.0, 10**30, -(10**30), 1e308, 2**53 + 1),
    *(float("nan"), float("inf"), float("-inf")),
    *("", "nan", "x" * 100_000, "<b>&</b>", "../../etc/passwd", "\u202e\x00", "\ud800"),
    *([], {}, [[]], [None], [0] * 50_000, {"": {}}, {"a": [1, {"b": None}]}),
]
SETTINGS = {"steps": 4}


def deep(depth: int = 100_000) -> bytes:
    return b"[" * depth + b"]" * depth


def schedule() -> sc.Schedule:
    layers = layers_of(2)
    rows = {
        layer.path: sc.Row((True, False, True, False), predictor)
        for layer, predictor in zip(layers, ["hold", "taylor", "taylor2", "hold"], strict=True)
    }
    return sc.Schedule(
        num_steps=4, rows=rows, layers=layers, model=MODEL, timesteps=(900.0, 600.0, 300.0, 0.0)
    )


def write_schedule(path: Path) -> None:
    schedule().save(path)


def write_published(path: Path) -> None:
    path.write_text(json.dumps({"attn": [1, 0, 1, 0], "mlp-1": [1, 1, 0, 0]}))


def write_calibration(path: Path) -> None:
    calibration_of(0.25, steps=4).save(path)


def write_routers(path: Path) -> None:
    values = np.array([[1.0, 0.25, 1.0, 0.5]] * 4)
    times = (9.0, 6.0, 3.0, 0.0)
    Routers(layers_of(2), values, 2, timesteps=times, total_macs=100, model=MODEL).save(path)


def write_journal(path: Path) -> None:
    journal = Journal(path, SETTINGS)
    for number in range(3):
        journal.record(("uncached", "every 2nd", number), 0.5 + number)


FORMATS: dict[str, tuple[Callable[[Path], None], Callable[[Path], Any], Callable[..., Any] | None]]
FORMATS = {
    "schedule": (write_schedule, sc.Schedule.load, sc.Schedule.save),
    "published schedule": (write_published, sc.Schedule.load, sc.Schedule.save),
    "calibration": (write_calibration, sc.Calibration.load, sc.Calibration.save),
    "routers": (write_routers, Routers.load, Routers.save),
    "journal": (write_journal, lambda path: Journal(path, SETTINGS), None),
}


def places(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value, as the keys that lead to it."""
    yield here
    items = value.items() if isinstance(value, dict) else []
    items = enumerate(value) if isinstance(value, list) else items
    for key, inner in items:
        yield from places(inner, (*here, key))


def put(value: Any, place: tuple[Any, ...], new: Callable[[Any], Any]) -> Any:
    """A copy of a JSON value with something else at a place; `new` may raise to delete it."""
    if not place:
        return new(value)
    copy: Any = dict(value) if isinstance(value, dict) else list(value)
    try:
        copy[place[0]] = put(copy[place[0]], place[1:], new)
    except LookupError:
        del copy[place[0]]
    return copy


def delete(_: Any) -> Any:
    raise LookupError


def mutated_json(text: bytes, rng: random.Random) -> bytes:
    """JSON with values exchanged, deleted, added and repeated."""
    value = json.loads(text)
    for _ in range(rng.randint(1, 3)):
        place = rng.choice(list(places(value)))
        odd = rng.choice(ODD)
        how = rng.randrange(4)
        if how == 0 and place:
            value = put(value, place, delete)
        elif how == 1:
            value = put(value, place, lambda old, odd=odd: [old, odd, old])
        elif how == 2 and place:
            value = put(value, place[:-1], lambda old, odd=odd: with_another(old, odd))
        else:
            value = put(value, place, lambda _, odd=odd: odd)
    written = json.dumps(value).encode("utf-8", "replace")
    if rng.random() < 0.05:
        written = written.replace(b": ", b": " + deep(20_000) + b", ", 1)
    if rng.random() < 0.05 and written.startswith(b"{"):  # a key twice
        written = written[:-1] + b", " + written[1:]
    return written


def with_another(value: Any, odd: Any) -> Any:
    if isinstance(value, dict):
        return {**value, "another": odd}
    return [*value, odd] if isinstance(value, list) else value


def mutated_bytes(content: bytes, rng: random.Random) -> bytes:
    """Bytes flipped, cut out, cut off, repeated and put in."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        if not changed:
            break
        at = rng.randrange(len(changed))
        how = rng.randrange(6)
        if how == 0:
            changed[at] = rng.randrange(256)
        elif how == 1:
            del changed[at:]
        elif how == 2:
            del changed[at : at + rng.randint(1, 40)]
        elif how == 3:
            changed[at:at] = changed[at : at + rng.randint(1, 400)]
        elif how == 4:
            changed[at:at] = rng.randbytes(rng.randint(1, 12))
        else:
            changed[at] ^= 1 << rng.randrange(8)
    return bytes(changed)


def split(content: bytes) -> tuple[bytes, bytes] | None:
    """Header and data of a safetensors file; None of any other."""
    if len(content) < 8 or content[:1] in b"[{":
        return None
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length]
    return (header, content[8 + length :]) if header.startswith(b"{") else None


def mutated(content: bytes, rng: random.Random) -> bytes:
    """A damaged copy of a file, changed as what it holds or as mere bytes."""
    if rng.random() < 0.3:
        return mutated_bytes(content, rng)
    parts = split(content)
    if parts is None:
        lines = content.splitlines(keepends=True)
        try:
            json.loads(content)
        except ValueError:  # a line each
            at = rng.randrange(len(lines))
            lines[at] = mutated_json(lines[at], rng) + b"\n"
            return b"".join(lines)
        return mutated_json(content, rng)
    header = json.loads(parts[0])
    if rng.random() < 0.5:
        written = mutated_json(parts[0], rng)
    else:
        name = rng.choice(list(header["__metadata__"]))
        document = header["__metadata__"][name]
        changed = mutated_json(document.encode(), rng).decode("utf-8", "replace")
        header["__metadata__"][name] = changed
        written = json.dumps(header).encode()
    length = len(written) if rng.random() < 0.9 else rng.choice([0, 2**63, len(written) + 8])
    return length.to_bytes(8, "little") + written + parts[1]


def tried(name: str, content: bytes, path: Path) -> bool:
    """Whether a damaged file was refused; anything but a plain refusal or a whole value fails."""
    _, load, save = FORMATS[name]
    path.write_bytes(content)
    started = time.monotonic()
    try:
        value = load(path)
    except sc.SmoothCacheError as error:
        assert path.name in str(error), f"the file is not named: {error}"
        assert len(str(error)) < 2000, "the message is too long to read"
        return True
    finally:
        assert time.monotonic() - started < MOST_SECONDS * 10  # a busy machine is no fault
    if save is not None:
        again = path.with_name("again" + path.suffix)
        save(value, again)
        assert as_text(load(again)) == as_text(value)
    return False


def as_text(value: Any) -> str:
    """What tells values apart; NaN is equal to itself in it."""
    return repr({key: repr(part) for key, part in vars(value).items()})


@pytest.mark.parametrize("name", FORMATS)
def test_mutated_files_are_refused_by_name(name: str, tmp_path: Path) -> None:
    rng = random.Random(COUNT)
    original, path = tmp_path / "original", tmp_path / "damaged.file"
    FORMATS[name][0](original)
    content = original.read_bytes()
    assert not tried(name, content, path)
    refused = sum(tried(name, mutated(content, rng), path) for _ in range(COUNT))
    assert refused > COUNT / 2


@pytest.mark.parametrize("name", FORMATS)
def test_hostile_files_cost_little(name: str, tmp_path: Path) -> None:
    path = tmp_path / "hostile.file"
    header = b'{"errors": {"dtype": "F64", "shape": [1000000000000], "data_offsets": [0, 8]}}'
    lying = len(header).to_bytes(8, "little") + header + bytes(8)
    hostile = [b"", b"\x00" * 64, deep(), b"9" * 100_000, b'{"a":' * 50_000, lying, b"\xff" * 4096]
    tracemalloc.start()
    try:
        for content in hostile:
            is_new = name == "journal" and not content  # an empty journal is begun
            assert tried(name, content, path) is not is_new
        assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
    finally:
        tracemalloc.stop()
