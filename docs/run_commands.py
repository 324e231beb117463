"""Runs the commands of command-line.md again and puts what they print below them.

    python docs/run_commands.py

A console block begins with a line `$ command`; what follows in the block is replaced. All commands
run in one empty folder, in which `shapes-dit` is the demo pipeline. Change the commands here or in
the page, never the output by hand.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import smoothcache.demo

PAGE = Path(__file__).with_name("command-line.md")
BLOCK = re.compile(r"```console\n\$ (?P<command>[^\n]+)\n(?P<output>.*?)```", re.DOTALL)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        pipeline = Path(smoothcache.demo.__file__).with_name("shapes-dit")
        (Path(folder) / "shapes-dit").symlink_to(pipeline)

        def rerun(block: re.Match[str]) -> str:
            command = block["command"]
            print(f"$ {command}", flush=True)
            return f"```console\n$ {command}\n{output_of(command, folder)}```"

        PAGE.write_text(BLOCK.sub(rerun, PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def output_of(command: str, folder: str) -> str:
    """What a command prints, on both streams, without trailing blanks."""
    scripts = str(Path(sys.executable).parent)
    done = subprocess.run(
        command,
        shell=True,
        cwd=folder,
        env={**os.environ, "PATH": f"{scripts}:{os.environ['PATH']}", "COLUMNS": "80"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    code = f"[exit code {done.returncode}]\n" if done.returncode else ""
    return "".join(f"{line.rstrip()}\n" for line in done.stdout.strip("\n").splitlines()) + code


if __name__ == "__main__":
    main()
