"""The command without the packages that it needs, and the name that brings them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from smoothcache import version


def test_missing_packages_are_one_sentence_and_exit_code_two() -> None:
    code = (
        "import sys; sys.modules['typer'] = sys.modules['rich'] = None; "
        "from smoothcache.__main__ import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "pip install '.[cli]'" in done.stderr


ROOT = Path(__file__).parents[1]
WRONG = re.compile(
    r"pip install [\"']?smoothcache(?!-diffusion)\b|[\"']smoothcache\[", re.IGNORECASE
)


def test_nobody_is_told_to_install_another_project_s_package() -> None:
    suffixes = {".py", ".md", ".toml", ".txt", ".cff", ".yml", ".ipynb"}
    folders = ("src", "docs", "examples", "benchmarks", "training", ".ci")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*")]
    files = [x for x in [*files, *ROOT.iterdir()] if x.is_file() and x.suffix in suffixes]
    assert len(files) > 50
    assert not [
        f"{file.relative_to(ROOT)}: {found[0]}"
        for file in files
        for found in WRONG.finditer(file.read_text(encoding="utf-8"))
    ]


class Namesake:
    """What ``importlib.metadata`` says of another distribution."""

    version = "1.0"

    def __init__(self, folder: Path, files: list[str]) -> None:
        self.folder, self.files = folder, files

    def locate_file(self, path: Path) -> Path:
        return self.folder / path


@pytest.mark.parametrize("installed", [True, False])
def test_another_project_s_package_in_the_same_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    package = tmp_path / "smoothcache"
    files = ["smoothcache/__init__.py"] if installed else ["smoothcache.pth"]
    monkeypatch.setattr(version, "distribution", lambda _: Namesake(tmp_path, files))
    if not installed:
        version.refuse_namesake(package)
        return
    with pytest.raises(ImportError, match=r"another project.*pip uninstall smoothcache"):
        version.refuse_namesake(package)
    version.refuse_namesake(tmp_path / "elsewhere" / "smoothcache")
