"""``smoothcache cache``: the calibrations that ``accelerate`` keeps on disk."""

from __future__ import annotations

from typing import Annotated

import typer.core

from ..app import app
from ..inputs import AsJson
from ..outputs import show, show_json

group = typer.Typer(
    rich_markup_mode="rich",
)
app.add_typer(group, name="cache")

Name = Annotated[
    str,
    typer.Argument(metavar="NAME", help="Of a calibration, or how it begins.", show_default=False),
]


@group.callback(invoke_without_command=True)
def cache(context: typer.Context) -> None:
    """The calibrations that accelerate keeps on disk: list, show or clear them."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@group.command("list")
def list_(as_json: AsJson = False) -> None:
    """List the calibrations and where they are.

    [bold]Example:[/bold] smoothcache cache list
    """
    from ...acceleration.cache import CalibrationCache

    kept = CalibrationCache()
    entries = kept.entries()
    if as_json:
        show_json(
            {
                "folder": str(kept.folder),
                "calibrations": [{"name": x.name, "bytes": x.nbytes} for x in entries],
            }
        )
        return
    for entry in entries:
        show(f"{entry.name}  {entry.nbytes / 2**20:.1f} MiB")
    total = sum(x.nbytes for x in entries)
    show(f"{len(entries)} calibration(s), {total / 2**20:.1f} MiB in {kept.folder}")


@group.command("show")
def show_(name: Name, as_json: AsJson = False) -> None:
    """Show what a calibration was measured on.

    [bold]Example:[/bold] smoothcache cache show DiTTransformer2DModel
    """
    from ...acceleration.cache import CalibrationCache

    entry = CalibrationCache().entry(name)
    calibration = entry.load()
    trajectories = calibration.trajectories
    about = {
        "file": str(entry.path),
        "samples": calibration.num_samples,
        "steps": calibration.num_steps,
        "solver": calibration.solver,
        "trajectories": trajectories is not None,
        "provenance": calibration.provenance,
    }
    if as_json:
        show_json(about)
        return
    show(str(calibration))
    kept = "no trajectories" if trajectories is None else "with trajectories"
    show(f"solver {calibration.solver or 'unknown'}, {kept}; {entry.path}")
    for key, text in calibration.provenance.items():
        show(f"  {key}: {text}")


@group.command("clear")
def clear(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME", help="Default: all of them.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Remove calibrations: those named, or all.

    [bold]Example:[/bold] smoothcache cache clear
    """
    from ...acceleration.cache import CalibrationCache

    kept = CalibrationCache()
    removed = kept.clear(names or ())
    if as_json:
        show_json({"folder": str(kept.folder), "removed": [x.name for x in removed]})
        return
    show(f"{len(removed)} calibration(s) removed from {kept.folder}")
