"""The command without the packages that it needs."""

from __future__ import annotations

import subprocess
import sys


def test_missing_packages_are_one_sentence_and_exit_code_two() -> None:
    code = (
        "import sys; sys.modules['typer'] = sys.modules['rich'] = None; "
        "from smoothcache.__main__ import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "pip install 'smoothcache[cli]'" in done.stderr
