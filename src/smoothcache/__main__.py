"""The ``smoothcache`` command, which says what to install where its packages are missing."""

from __future__ import annotations

import sys

from .version import how_to_install

NEEDED = ("typer", "rich", "click")


def main() -> None:
    """Runs the command line."""
    try:
        from .cli.app import app
    except KeyboardInterrupt:  # torch takes seconds to import
        sys.stderr.write("interrupted\n")
        sys.exit(130)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in NEEDED:
            raise
        sys.stderr.write(
            f"The smoothcache command needs {error.name}, which is not installed: "
            f"{how_to_install('cli')}\n"
        )
        sys.exit(2)
    app(prog_name="smoothcache")


if __name__ == "__main__":
    main()
