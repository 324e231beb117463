"""The paper's figures, from what a run left in its folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..calibration.curves import Calibration
from ..checks import listed
from ..errors import FileFormatError, InvalidArgumentError
from ..generation.manifest import FILE
from ..generation.reading import SampleSet
from ..plots.curves import composition, plot_composition, plot_error_curves
from ..plots.eligible import plot_eligible_layers
from ..plots.samples import plot_image_grid, plot_spectrograms
from ..plots.teaser import Panel, plot_teaser

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Group:
    """Samples of one model, number of steps and seed: without a cache, and under schedules.

    Attributes:
        name: Of the run, with the number of steps.
        uncached: The samples without a schedule.
        cached: The others, with the names of their rows.
    """

    name: str
    uncached: SampleSet
    cached: tuple[tuple[str, SampleSet], ...]

    @property
    def title(self) -> str:
        """The pipeline and its steps."""
        settings = self.uncached.manifest.settings or {}
        return f"{settings.get('pipeline', 'samples')}, {settings.get('steps', '?')} steps"


def draw_figures(
    runs: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    model: Any = None,
    calibrations: Sequence[str | os.PathLike[str]] = (),
    num_samples: int = 8,
    ending: str = "png",
) -> list[Path]:
    """Draws what there is to draw in the folders of runs.

    ``figure-1``: samples of all runs, uncached and cached. ``figure-2``: error curves of each
    calibration. ``figure-3``: which layers of a model are eligible. ``figure-4``: what its compute
    consists of. ``figure-5``: images of each number of steps, or frames of clips, beside their
    differences. ``figure-6``: spectrograms likewise.

    Args:
        runs: Folders that ``evaluate_schedules`` or a script of ``reproduce`` wrote: with folders
            of samples in them, and calibrations.
        output: Folder for the pictures; made if it does not exist.
        model: A pipeline or module for Figure 3; None for none.
        calibrations: Further files of calibrations.
        num_samples: How many samples are drawn.
        ending: ``"png"``, ``"svg"`` or ``"pdf"``.

    Returns:
        The pictures.

    Raises:
        InvalidArgumentError: If there is nothing to draw.
        FileFormatError: If a file is damaged.
        MissingPackageError: If matplotlib is not installed.

    Example:
        >>> import tempfile
        >>> from diffusers import DiTTransformer2DModel
        >>> model = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, num_layers=3)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     [path.name for path in draw_figures([], folder, model=model)]
        ['figure-3.png']
    """
    if ending not in ("png", "svg", "pdf"):
        raise InvalidArgumentError(f"pictures end in png, svg or pdf, not {ending!r}.")
    groups = [group for run in runs for group in groups_in(Path(run))]
    files = [*(x for run in runs for x in sorted(Path(run).glob("*.safetensors"))), *calibrations]
    measured = {Path(file): Calibration.load(file) for file in files}
    drawn: dict[str, Figure] = {}
    if groups:
        drawn["figure-1"] = plot_teaser([_panel(group, min(6, num_samples)) for group in groups])
    for file, calibration in measured.items():
        name = _numbered("figure-2", f"{file.parent.name}-{file.stem}", len(measured))
        drawn[name] = plot_error_curves(calibration)
    if model is not None:
        drawn["figure-3"] = plot_eligible_layers(model)
    bars = [(file.stem, x) for file, x in measured.items() if x.total_macs]
    if bars:
        named = [(x.model.class_name if x.model else stem, composition(x)) for stem, x in bars]
        drawn["figure-4"] = plot_composition(list({name: (name, x) for name, x in named}.values()))
    for group in groups:
        number = "figure-6" if group.uncached.manifest.layout == "wav" else "figure-5"
        name = _numbered(number, group.name, len(groups))
        drawn[name] = _beside(group, num_samples)
    if not drawn:
        raise InvalidArgumentError(
            f"there is nothing to draw in {listed(map(str, runs)) or 'no run'}: no calibration and "
            "no samples under a schedule beside those without one. Name a model to draw its layers."
        )
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in drawn.items():
        paths.append(folder / f"{name}.{ending}")
        figure.savefig(paths[-1], dpi=160)
    return paths


def groups_in(run: Path) -> list[Group]:
    """The samples in a run's folder that belong side by side.

    Raises:
        FileFormatError: If the folder does not exist, or one of the samples is not complete.
    """
    if not run.is_dir():
        raise FileFormatError(f"there is no folder '{run}'.")
    places = sorted(x.parent for x in (*run.glob(f"*/{FILE}"), *run.glob(f"*/*/{FILE}")))
    sets = [SampleSet.open(place) for place in places]
    groups: dict[tuple[Any, ...], list[SampleSet]] = {}
    for one in sets:
        manifest, settings = one.manifest, one.manifest.settings or {}
        known = (manifest.layout, manifest.seed, manifest.inputs, settings.get("steps"))
        key = (*known, settings.get("weights"), manifest.num_samples)
        groups.setdefault(key, []).append(one)
    found: list[Group] = []
    for members in groups.values():
        plain = [x for x in members if (x.manifest.settings or {}).get("schedule") is None]
        others = [x for x in members if x not in plain]
        if plain and others:
            cached = tuple((x.path.name.replace("-", " "), x) for x in others)
            steps = (plain[0].manifest.settings or {}).get("steps", len(found))
            found.append(Group(f"{run.name}-{steps}", plain[0], cached))
    return found


def first_samples(samples: SampleSet, count: int) -> Tensor:
    """The first samples: images and clips in [0, 1], sounds; [samples, ...]."""
    parts: list[Tensor] = []
    for file in samples.files:
        if sum(map(len, parts)) >= count:
            break
        parts.append(samples.read(file))
    shortest = min(x.shape[1] for x in parts)  # a GIF joins frames that do not differ
    made = torch.cat([x[:, :shortest] for x in parts])[:count]
    return made.float() / 255 if made.dtype == torch.uint8 else made


def _panel(group: Group, count: int) -> Panel:
    sets = [("uncached", group.uncached), *group.cached[:2]]
    rows = [
        (name, first_samples(x, 4 if x.manifest.layout == "wav" else count)) for name, x in sets
    ]
    return Panel(group.title, rows, group.uncached.manifest.sampling_rate)


def _beside(group: Group, count: int) -> Figure:
    manifest = group.uncached.manifest
    if manifest.layout == "wav":
        count = min(count, 4)
    reference = first_samples(group.uncached, count)
    rows = [(name, first_samples(x, count)) for name, x in group.cached]
    if manifest.layout == "wav" and manifest.sampling_rate is not None:
        return plot_spectrograms(rows, reference, manifest.sampling_rate)
    if reference.ndim == 5:  # of the first clip its frames
        length = min(len(x[0]) for x in (reference, *(x for _, x in rows)))
        rows, reference = [(name, x[0, :length]) for name, x in rows], reference[0, :length]
    return plot_image_grid(rows, reference)


def _numbered(figure: str, name: str, count: int) -> str:
    return figure if count == 1 else f"{figure}-{name}"
