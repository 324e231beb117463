"""Files of prompts: four formats, with names where the file gives them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from smoothcache.errors import FileFormatError
from smoothcache.generation import read_prompts


@pytest.mark.parametrize(
    ("file", "data", "prompts"),
    [
        ("a.txt", "ein Würfel\nzwei\n\n", ("ein Würfel", "zwei")),
        ("a.txt", "\ufeffa\r\nb", ("a", "b")),
        ("a.jsonl", '"a"\n{"prompt": "b, c", "id": 3}\n', ("a", "b, c")),
        ("a.csv", 'id,Prompt\n1,"a, ""b"""\n2,c\n', ('a, "b"', "c")),
        ("a.csv", '\ufeffprompt\n"two\nlines"\n', ("two\nlines",)),
        ("a.json", '["a", {"prompt": "b"}]', ("a", "b")),
    ],
)
def test_prompt_files(file: str, data: str, prompts: tuple[str, ...], tmp_path: Path) -> None:
    (path := tmp_path / file).write_text(data, encoding="utf-8", newline="")
    assert read_prompts(path) == (prompts, ())
    path.write_text(data.lstrip("\ufeff"), encoding="utf-16", newline="")
    assert read_prompts(path) == (prompts, ())


@pytest.mark.parametrize(
    ("file", "data"),
    [
        ("a.json", '{"7": "a", "3": "b"}'),
        ("a.json", '[{"prompt": "a", "name": "7"}, {"name": "3", "prompt": "b"}]'),
        ("a.jsonl", '{"prompt": "a", "name": "7"}\n{"name": "3", "prompt": "b"}'),
        ("a.csv", "Name,prompt\n7,a\n3,b\n"),
    ],
)
def test_prompts_with_names(file: str, data: str, tmp_path: Path) -> None:
    (path := tmp_path / file).write_text(data, encoding="utf-8")
    assert read_prompts(path) == (("a", "b"), ("7", "3"))


@pytest.mark.parametrize(
    ("file", "data", "said"),
    [
        ("a.txt", b"", "there is no prompt"),
        ("a.txt", b"\n \n", "there is no prompt"),
        ("a.txt", b"a\n\nb\n", "line 2: the prompt is empty"),
        ("a.txt", b"a\nb\xe9\n", "line 2: not UTF-8 (byte 0xe9 at 3); save the file as UTF-8"),
        ("a.txt", b"a\x00b\x00", "line 1: a zero byte"),
        ("a.md", b"a", "must end in '.txt', '.jsonl', '.csv', '.json'"),
        ("a.jsonl", b'"a"\n{bad}\n', "line 2: not valid JSON"),
        ("a.jsonl", b'{"text": "a"}\n', "no field 'prompt'; it has 'text'"),
        ("a.jsonl", b"[1]\n", "must be a text, got [1]"),
        ("a.jsonl", b'"a"\n\n"b"', "line 2: the prompt is empty"),
        ("a.csv", b"text\na\n", "the first line has no column 'prompt'; it has 'text'"),
        ("a.csv", b'prompt\n"a\n', "unexpected end of data"),
        ("a.csv", b"id,prompt\n1\n", "line 2: the prompt is empty"),
        ("a.csv", b"name,prompt\nx,a\n,b\n", "line 3: the prompt has no name"),
        ("a.jsonl", b'"a"\n{"prompt": "b", "name": "x"}\n', "line 1: the prompt has no name"),
        ("a.jsonl", b'{"prompt": "b", "name": 3}\n', "the name must be a text, got 3"),
        ("a.json", b"[]", "there is no prompt"),
        ("a.json", b"{", "not valid JSON"),
        ("a.json", b"3", "an object of names and prompts, got 3"),
        ("a.json", b'["a", " "]', "entry 2: the prompt is empty"),
        ("a.json", b'{"x": 1}', "the prompt 'x': the prompt must be a text, got 1"),
        ("a.json", b'{"x": "a", "x": "b"}', "twice"),
    ],
)
def test_prompt_files_that_are_refused(file: str, data: bytes, said: str, tmp_path: Path) -> None:
    (path := tmp_path / file).write_bytes(data)
    with pytest.raises(FileFormatError) as error:
        read_prompts(path)
    assert said in str(error.value)


def test_a_prompt_file_of_any_size_is_not_read(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("smoothcache.generation.prompts.MOST_BYTES", 3)
    (path := tmp_path / "a.txt").write_text("long")
    with pytest.raises(FileFormatError, match="more than the 3"):
        read_prompts(path)


def test_a_prompt_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="there is no file"):
        read_prompts(tmp_path / "a.txt")
    (tmp_path / "b.txt").mkdir()
    with pytest.raises(FileFormatError, match="cannot be read"):
        read_prompts(tmp_path / "b.txt")
