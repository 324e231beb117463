"""Compares what is printed for people with text files, so that a change is read as a whole."""

from __future__ import annotations

import os
import re
from pathlib import Path

GOLDEN = Path(__file__).parents[1] / "golden"
UPDATE = "SMOOTHCACHE_UPDATE_GOLDEN"


def assert_golden(printed: object, name: str) -> None:
    """What is printed is what ``tests/golden/<name>.txt`` holds, spaces at line ends aside.

    With ``SMOOTHCACHE_UPDATE_GOLDEN=1`` the file is written instead; read the change before it is
    committed.

    Args:
        printed: A text, or what has one.
        name: Path of the file below ``tests/golden``, without its ending.
    """
    text = "".join(f"{line.rstrip()}\n" for line in str(printed).strip("\n").split("\n"))
    file = GOLDEN / f"{name}.txt"
    if os.environ.get(UPDATE) == "1":
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    assert file.is_file(), f"there is no {file}; set {UPDATE}=1 to write it"
    assert text == file.read_text(encoding="utf-8"), f"set {UPDATE}=1 to accept this change"


def masked(text: str, *folders: Path) -> str:
    """The text without what differs from run to run: folders and durations."""
    for folder in folders:
        text = text.replace(str(folder), "FOLDER")
    return re.sub(r"\b\d+\.\d s\b", "N s", text)


def last_of_bar(printed: str) -> str:
    """How a progress bar ended, without what differs from run to run."""
    line = printed.rstrip("\n").rpartition("\r")[2].rpartition("\n")[2]
    line = re.sub(r"\|.*?\|", "|BAR|", line)
    line = re.sub(r"\d+:\d+(<\d+:\d+)?", "TIME", line)
    line = re.sub(r"(best error) [\d.e-]+", r"\1 N", line)
    return re.sub(r" +[\d.?]+ ?(s/\w+|\w+/s)", " RATE", line)
