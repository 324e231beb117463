"""``smoothcache inspect``: which layers a model has and what they cost."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer.core

from ...calibration.calibrate import calibrate as run_calibration
from ...layers.find import find_layers
from ...layers.modules import identify
from ...model.costs import human_macs
from .. import tables as tables
from ..app import app
from ..inputs import AsJson, Grain, GrainOption, ModelArgument
from ..options import Setup, with_setup
from ..outputs import show, show_json, status_line


@app.command()
@with_setup
def inspect(
    model: ModelArgument,
    setup: Setup,
    layers: Annotated[bool, typer.Option("--layers", help="List every layer.")] = False,
    costs: Annotated[
        bool, typer.Option("--costs/--no-costs", help="Run two steps to count what layers cost.")
    ] = True,
    granularity: GrainOption = Grain.auto,
    as_json: AsJson = False,
) -> None:
    """Show which layers of a model can be reused, and their share of its cost.

    Costs are counted while two steps run with some input, in multiply-accumulates (MACs) of one
    step of one sample, guidance included.

    [bold]Example:[/bold] smoothcache inspect ./my-dit --layers
    """
    pipeline = setup.load(model)
    found, total = find_layers(pipeline, granularity=granularity.value), 0
    if costs:
        sampler = setup.any_sampler(pipeline, 2)
        with status_line("running two steps"):
            observed = run_calibration(
                pipeline, sampler, 1, 1, granularity=granularity.value, progress=False
            )
        found = list(observed.layers)
        total = observed.total_macs
    kinds = tables.kinds(found, total)
    identity = identify(pipeline)
    if as_json:
        show_json(
            {
                "pipeline": type(pipeline).__name__,
                "model": asdict(identity),
                "macs_per_step": total or None,
                "kinds": kinds,
                "layers": [asdict(layer) for layer in found],
            }
        )
        return
    blocks = len({layer.block for layer in found})
    cost = f", {human_macs(total)} a step" if total else ""
    show(
        f"{type(pipeline).__name__} with {identity.class_name}: "
        f"{len(found)} layers in {blocks} blocks{cost}"
    )
    show(tables.kinds_table(kinds, total))
    if layers:
        show(tables.layers_table(found, total))
