"""The name and version of the distribution, which is not called like the package that it brings."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

DISTRIBUTION = "smoothcache-diffusion"  # on PyPI "smoothcache" is another project

try:
    __version__ = version(DISTRIBUTION)
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0.0.0"


def how_to_install(extra: str) -> str:
    """The commands that bring an extra.

    >>> how_to_install("plots")
    "pip install '.[plots]' in a clone, or pip install 'smoothcache-diffusion[plots]'"

    Args:
        extra: One of the extras of ``pyproject.toml``.
    """
    return f"pip install '.[{extra}]' in a clone, or pip install '{DISTRIBUTION}[{extra}]'"


def refuse_namesake(package: Path = Path(__file__).parent) -> None:
    """Refuses to run where another project's package was installed into the same folder.

    The two overwrite each other's files, so neither can be trusted.

    Args:
        package: The folder of this package.

    Raises:
        ImportError: If a distribution called "smoothcache" has put its files here.
    """
    try:
        other = distribution("smoothcache")
    except PackageNotFoundError:
        return
    file = Path("smoothcache", "__init__.py")
    puts_it_here = Path(str(other.locate_file(file))).resolve() == (package / file.name).resolve()
    if puts_it_here and any(Path(str(name)) == file for name in other.files or ()):
        raise ImportError(
            f"another project's package, 'smoothcache' {other.version}, is installed in the same "
            f"folder ({package}), and the two overwrite each other's files. Run "
            f"pip uninstall smoothcache, then install {DISTRIBUTION} again."
        )
