"""The documentation holds: its code runs, its files load, its commands and messages exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
from support.prompt_pipeline import STEPS, PromptPipeline
from support.tiny_pipeline import build_clip_pipeline, save_pipeline
from typer.testing import CliRunner

import smoothcache
from smoothcache import Schedule

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PACKAGE = Path(smoothcache.__file__).parent
PAGES = sorted(DOCS.glob("*.md"))
BLOCK = re.compile(r"^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]]+\]\((?!https?://)(?P<target>[^)]+)\)")


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """The blocks of a language with the line each begins on."""
    text = page.read_text(encoding="utf-8")
    found = [x for x in BLOCK.finditer(text) if x["language"] == language]
    return [(text[: x.start("text")].count("\n"), x["text"]) for x in found]


def test_all_pages_are_seen() -> None:
    assert [page.stem for page in PAGES] == [
        *("README", "audio", "command-line", "concepts", "errors", "evaluation", "extending"),
        *(
            "file-formats",
            "living-with-other-tools",
            "metrics",
            "models",
            "quick-start",
            "reliability",
            "reports",
            "sharing",
            "speed",
            "video",
            "which-method",
        ),
        "your-own-model",
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    save_pipeline(folder / "my-dit")
    build_clip_pipeline(depth=1).save_pretrained(folder / "my-video")
    return folder


@pytest.mark.filterwarnings("ignore:Should have t[ab]:UserWarning")  # torchsde, of rounding
@pytest.mark.parametrize("page", [x for x in PAGES if blocks(x, "python")], ids=lambda x: x.stem)
def test_code_runs(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    names: dict[str, object] = {"__name__": page.stem}
    for line, text in blocks(page, "python"):
        exec(compile("\n" * line + text, str(page), "exec"), names)


def test_code_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a toy that takes prompts; what it makes are no images, but have the name."""
    monkeypatch.setenv("SMOOTHCACHE_CACHE", str(tmp_path))

    class Images(tuple[torch.Tensor]):
        @property
        def images(self) -> torch.Tensor:
            return self[0]

    class Pipeline(PromptPipeline):
        def __call__(
            self,
            prompt: str,
            num_inference_steps: int = STEPS,
            guidance_scale: float = 1.0,
            generator: torch.Generator | None = None,
        ) -> Images:
            return Images(super().__call__(prompt, num_inference_steps, guidance_scale, generator))

    ((_, text),) = blocks(ROOT / "README.md", "python")
    names: dict[str, object] = {"pipe": Pipeline()}
    exec(compile(text, "README.md", "exec"), names)
    assert isinstance(names["image"], torch.Tensor)


def test_example_files_are_what_the_code_writes(tmp_path: Path) -> None:
    ((_, text),) = blocks(DOCS / "file-formats.md", "json")
    (tmp_path / "example.json").write_text(text)
    Schedule.load(tmp_path / "example.json").save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == text


def test_commands_and_options_exist() -> None:
    from smoothcache.cli.app import app

    commands = [
        text.splitlines()[0].removeprefix("$ ").split()
        for _, text in blocks(DOCS / "command-line.md", "console")
    ]
    assert {words[1] for words in commands} == {
        *("demo", "inspect", "calibrate", "plan", "search", "generate", "compare", "benchmark"),
        "doctor",
        *("sample", "evaluate", "figures"),
    }
    for program, command, *words in commands:
        assert program == "smoothcache"
        shown = CliRunner().invoke(app, [command, "--help"]).stdout
        options = [word for word in words if re.fullmatch(r"--?[a-z-]+", word)]
        assert all(option in shown for option in options)


def test_commands_have_their_output() -> None:
    for _, text in blocks(DOCS / "command-line.md", "console"):
        assert len(text.splitlines()) > 1, "run docs/run_commands.py"


@pytest.mark.parametrize(
    "page",
    [*PAGES, *(ROOT / f"{x}.md" for x in ("README", "CONTRIBUTING"))],
    ids=lambda x: f"{x.parent.name}-{x.stem}",
)
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.finditer(page.read_text(encoding="utf-8")):
        name, _, anchor = link["target"].partition("#")
        target = page.parent / name if name else page
        assert target.is_file(), link["target"]
        if target.suffix != ".md":
            continue
        text = target.read_text(encoding="utf-8")
        titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
        anchors = {re.sub(r"[^\w -]", "", x.lower()).replace(" ", "-") for x in titles}
        anchors |= set(re.findall(r"^::: (\S+)$", text, re.MULTILINE))
        assert not anchor or anchor in anchors, link["target"]


def texts_of_the_code() -> str:
    """All texts in the source; what is filled in later is an asterisk."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (x.value if isinstance(x, ast.Constant) else "*" for x in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_messages_exist() -> None:
    page = (DOCS / "errors.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^\| `([^`]+)` \|", page.partition("## Messages")[2], re.MULTILINE)
    assert len(quoted) > 20
    code = texts_of_the_code().replace("*", "model_index.json")
    assert [message for message in quoted if message not in code] == []
