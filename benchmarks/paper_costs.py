"""Recounts the costs that the SmoothCache paper prints, from the architectures alone.

    python benchmarks/paper_costs.py [--json FILE]

Builds DiT-XL/2-256, Open-Sora v1.2 and Stable Audio Open at full size on the meta device, where
nothing is computed, counts one real forward of each, and applies the published schedules. Prints
what the paper prints beside what was counted, and exits with 1 if a figure is out of its tolerance.

What the paper's columns count (no formula is printed there; these are the only conventions found
that meet its figures):

- Table 1: 50, 30 or 70 steps of a batch of 32 with classifier-free guidance, that is 64 forward
  samples a step; weights of linear and convolution layers, no attention products, no biases. The
  authors ran the original DiT, which embeds the timestep once. In diffusers every block does, and
  the first one twice; that is 0.04 % more, and not counted here.
- Table 2: 30 steps with guidance of 480 x 854 pixels and 2 s, that is 15 latent frames of 30 x 53
  tokens, and 300 tokens of text; weights. The printed 1612.1 is met only with the decoding of the
  VAE, which is none of the denoiser's work; recounted is the denoiser alone.
- Table 3: 100 steps of a guidance batch of 2, the full window of 1024 latents (and one token that
  stands for the global conditions), 130 text tokens; weights plus biases.
- Figure 4: shares of the uncached run with the attention products.

Sources: Liu et al., "SmoothCache", arXiv 2411.10510, Tables 1 to 3 and Figure 4; the authors'
schedules in tests/data/published_schedules.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import smoothcache as sc
from smoothcache.model.costs import MacCounter
from smoothcache.schedule.row import Row

SCHEDULES = Path(__file__).parents[1] / "tests" / "data" / "published_schedules"

TABLE_1_TOLERANCE = 0.004  # relative
TABLE_2_TOLERANCE = 0.001  # relative
TABLE_3_TOLERANCE = 0.001  # relative
FIGURE_4_TOLERANCE = 0.2  # percentage points


@dataclass(frozen=True)
class Table1Row:
    """One row of Table 1: TMACs of 32 images.

    Attributes:
        name: The row's name in the paper.
        steps: DDIM steps.
        tmacs: As printed.
        schedule: File name of the published schedule; an interval for FORA, for which none was
            published (every n-th step and the last, as in the published FORA files); None for
            the uncached sampler.
    """

    name: str
    steps: int
    tmacs: float
    schedule: str | int | None


# File names read steps-N-k_max-method. Which file goes with which row follows from the number of
# computed steps, which the printed TMACs give almost exactly (nearly all of a step is in layers):
# steps x printed / printed without cache = 46.0 for alpha 0.08, 24.0 for 0.18, 26.0 for FORA n=2
# of 50 steps; 16.0 for 0.35 and for FORA of 30; 34.0 for 0.08 and 36.0 for FORA of 70. The files
# compute just as many steps. So every alpha in a file's name is that of its row, although not of
# the same error curves: 0.08 reuses 4 of 50 steps, but 36 of 70. Of Learning-to-Cache one file
# exists. The rows 0.22 (50 steps) and 0.12 (70 steps) have no file. `diffuser_schedule.json` has
# attention alone, for another pipeline, and belongs to no row.
TABLE_1 = (
    Table1Row("L2C (trained)", 50, 278.71, "50-N-2-l2c.json"),
    Table1Row("no cache", 50, 365.59, None),
    Table1Row("SmoothCache alpha=0.08", 50, 336.37, "50-N-3-threshold-0.08.json"),
    Table1Row("FORA n=2", 50, 190.25, "50-N-2-fora.json"),
    Table1Row("SmoothCache alpha=0.18", 50, 175.65, "50-N-3-threshold-0.18.json"),
    Table1Row("FORA n=3", 50, 131.81, 3),
    Table1Row("no cache", 30, 219.36, None),
    Table1Row("FORA n=2", 30, 117.08, "30-N-2-fora.json"),
    Table1Row("SmoothCache alpha=0.35", 30, 117.08, "30-N-3-threshold-0.35.json"),
    Table1Row("no cache", 70, 511.83, None),
    Table1Row("FORA n=2", 70, 263.43, "70-N-2-fora.json"),
    Table1Row("SmoothCache alpha=0.08", 70, 248.80, "70-N-3-threshold-0.08.json"),
    Table1Row("FORA n=3", 70, 175.77, 3),
)
TABLE_2_DENOISER = 1491.7  # TMACs of one clip, 30 steps, as recounted once before by formulas
TABLE_3_NO_CACHE = 209.82  # TMACs of one sound, 100 steps

# Figure 4 is a drawing. These are shares recounted once before, by formulas instead of by running
# the model, in per cent.
COMPOSITION = {
    "DiT-XL/2": {"self_attn": 35.6, "ffn": 64.2, "other": 0.2},
    "Open-Sora v1.2": {"self_attn": 33.8, "cross_attn": 16.0, "ffn": 50.2, "other": 0.0},
    "Stable Audio Open": {"self_attn": 27.3, "cross_attn": 11.4, "ffn": 61.3, "other": 0.0},
}


@dataclass(frozen=True)
class Cost:
    """MACs of a part of one step, in the conventions that the paper mixes."""

    weights: int
    attention: int
    biases: int

    @property
    def total(self) -> int:
        return self.weights + self.attention

    def minus(self, other: Cost, times: int = 1) -> Cost:
        return Cost(
            self.weights - times * other.weights,
            self.attention - times * other.attention,
            self.biases - times * other.biases,
        )


@dataclass(frozen=True)
class StepCost:
    """Cost of one uncached step.

    Attributes:
        whole: The whole denoiser, layers included.
        layers: Each layer that can be reused, by its path.
        kinds: Kind of each layer, by its path.
    """

    whole: Cost
    layers: Mapping[str, Cost]
    kinds: Mapping[str, str]

    def shares(self) -> dict[str, float]:
        """Per cent of the MACs in each kind of layer and in everything else.

        Spatial and temporal layers count together, as in the paper.
        """
        macs: dict[str, int] = defaultdict(int)
        for path, cost in self.layers.items():
            kind = self.kinds[path].removeprefix("spatial_").removeprefix("temporal_")
            macs[kind] += cost.total
        macs["other"] = self.whole.total - sum(macs.values())
        return {kind: 100 * value / self.whole.total for kind, value in macs.items()}


@dataclass(frozen=True)
class Figure:
    """A figure of the paper beside ours.

    Attributes:
        source: Where it is printed.
        name: Which one it is.
        unit: TMACs or per cent.
        printed: The paper's.
        counted: Ours.
        met: Whether the difference is within the tolerance.
    """

    source: str
    name: str
    unit: str
    printed: float
    counted: float
    met: bool


def dit_step() -> StepCost:
    """Counts one step of DiT-XL/2-256 for 32 images with guidance in the same batch."""
    from diffusers import DiTTransformer2DModel

    images = 32
    with torch.device("meta"):
        model = DiTTransformer2DModel(
            num_attention_heads=16,
            attention_head_dim=72,
            in_channels=4,
            out_channels=8,
            num_layers=28,
            attention_bias=True,
            sample_size=32,
            patch_size=2,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_zero",
            norm_elementwise_affine=False,
        ).eval()
        samples = 2 * images
        latents = torch.empty(samples, 4, 32, 32)
        timesteps = torch.empty(samples, dtype=torch.long)
        labels = torch.empty(samples, dtype=torch.long)
    step = count_step(model, lambda: model(latents, timesteps, labels))
    with torch.inference_mode(), MacCounter() as counter:
        model.transformer_blocks[0].norm1.emb(timesteps, labels, hidden_dtype=torch.float32)
    once_too_often, times = _read(counter), len(model.transformer_blocks)
    return replace(step, whole=step.whole.minus(once_too_often, times))


def open_sora_step() -> StepCost:
    """Counts one step of Open-Sora v1.2 for one clip of 480p and 2 s, without guidance.

    51 frames of 480 x 854 pixels become 15 of 60 x 106 latents. The captions of a batch lie in one
    sequence there, so that a batch of two would count products that its attention never makes.
    """
    from zoo.layouts import STDiT3

    frames, height, width, text_tokens = 15, 60, 106, 300
    with torch.device("meta"):
        model = STDiT3(1152, 16, 28, 4096, text_tokens).eval()
        latents = torch.empty(1, 4, frames, height, width)
        timestep, fps = torch.empty(1), torch.empty(1)
        caption = torch.empty(1, 1, text_tokens, 4096)
    size = {"height": torch.tensor([480.0]), "width": torch.tensor([854.0])}  # read by the host
    return count_step(model, lambda: model(latents, timestep, caption, fps=fps, **size))


def stable_audio_step() -> StepCost:
    """Counts one step of Stable Audio Open for one sound with guidance in the same batch.

    The text encoder of its pipeline pads to 128 tokens; start and end of the sound, in seconds,
    are two more. Both also make the global conditions, one token before the latents.
    """
    from diffusers import StableAudioDiTModel

    batch, window, text_tokens = 2, 1024, 128 + 2
    with torch.device("meta"):
        model = StableAudioDiTModel(
            sample_size=window,
            in_channels=64,
            num_layers=24,
            attention_head_dim=64,
            num_attention_heads=24,
            num_key_value_attention_heads=12,
            out_channels=64,
            cross_attention_dim=768,
            time_proj_dim=256,
            global_states_input_dim=1536,
            cross_attention_input_dim=768,
        ).eval()
        inputs = {
            "hidden_states": torch.empty(batch, 64, window),
            "timestep": torch.empty(1),
            "encoder_hidden_states": torch.empty(batch, text_tokens, 768),
            "global_hidden_states": torch.empty(batch, 1, 1536),
            "rotary_embedding": (torch.empty(window + 1, 32), torch.empty(window + 1, 32)),
        }
    return count_step(model, lambda: model(**inputs))


def count_step(model: torch.nn.Module, forward: Callable[[], object]) -> StepCost:
    """Runs one forward and counts it, as a whole and layer by layer.

    Args:
        model: The denoiser.
        forward: Calls it once.
    """
    layers = sc.find_layers(model)
    counter = MacCounter()
    with _watched(model, [layer.path for layer in layers], counter) as costs:
        with torch.inference_mode(), counter:
            forward()
            whole = _read(counter)
    return StepCost(whole, costs, {layer.path: layer.kind for layer in layers})


@contextmanager
def _watched(
    model: torch.nn.Module, paths: Sequence[str], counter: MacCounter
) -> Iterator[dict[str, Cost]]:
    """Fills a mapping with the cost of each layer as it runs."""
    started: dict[str, Cost] = {}
    costs: dict[str, Cost] = {}

    def before(path: str) -> Callable[..., None]:
        return lambda module, args: started.update({path: _read(counter)})

    def after(path: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: Any, output: Any) -> None:
            costs[path] = _read(counter).minus(started[path])

        return hook

    hooks = []
    for path in paths:
        layer = model.get_submodule(path)
        hooks += [layer.register_forward_pre_hook(before(path))]
        hooks += [layer.register_forward_hook(after(path))]
    try:
        yield costs
    finally:
        for hook in hooks:
            hook.remove()


def _read(counter: MacCounter) -> Cost:
    return Cost(counter.weights, counter.attention, counter.biases)


def run_weights(step: StepCost, schedule: sc.Schedule) -> int:
    """Gives the MACs with weights of a run under a bound schedule."""
    saved = sum(
        row.computed.count(False) * step.layers[path].weights for path, row in schedule.rows.items()
    )
    return schedule.num_steps * step.whole.weights - saved


def table_1(step: StepCost) -> list[Figure]:
    """Table 1, for every row whose schedule is known."""
    layers = [
        sc.CacheLayer(path, kind=kind, block=path.rpartition(".")[0])
        for path, kind in step.kinds.items()
    ]
    figures = []
    for row in TABLE_1:
        counted = run_weights(step, _bound(row, layers)) / 1e12
        met = abs(counted / row.tmacs - 1) <= TABLE_1_TOLERANCE
        name = f"{row.steps} steps, {row.name}"
        source = "Table 1" if isinstance(row.schedule, str | None) else "Table 1, no file published"
        figures.append(Figure(source, name, "TMACs", row.tmacs, counted, met))
    return figures


def _bound(row: Table1Row, layers: Sequence[sc.CacheLayer]) -> sc.Schedule:
    if isinstance(row.schedule, str):
        schedule = sc.Schedule.load(SCHEDULES / row.schedule).bind(layers)
        if schedule.num_steps != row.steps:
            raise ValueError(f"{row.schedule} has {schedule.num_steps} steps, not {row.steps}.")
        return schedule
    computed = Row.uniform(row.steps, row.schedule or 1, last=True)
    return sc.Schedule(row.steps, {layer.path: computed for layer in layers}, tuple(layers))


def table_2(step: StepCost) -> list[Figure]:
    """Table 2, the uncached row without the VAE."""
    counted = 30 * 2 * step.whole.weights / 1e12
    met = abs(counted / TABLE_2_DENOISER - 1) <= TABLE_2_TOLERANCE
    name = "30 steps, no cache"
    return [Figure("Table 2, without the VAE", name, "TMACs", TABLE_2_DENOISER, counted, met)]


def table_3(step: StepCost) -> list[Figure]:
    """Table 3, the uncached row; no schedule of the others was published."""
    counted = 100 * (step.whole.weights + step.whole.biases) / 1e12
    met = abs(counted / TABLE_3_NO_CACHE - 1) <= TABLE_3_TOLERANCE
    name = "100 steps, no cache"
    return [Figure("Table 3", name, "TMACs", TABLE_3_NO_CACHE, counted, met)]


def figure_4(model: str, step: StepCost) -> list[Figure]:
    """Figure 4: the composition of one model's compute."""
    figures = []
    shares = step.shares()
    for kind in dict.fromkeys([*COMPOSITION[model], *shares]):
        printed, counted = COMPOSITION[model].get(kind, 0.0), shares.get(kind, 0.0)
        met = abs(counted - printed) <= FIGURE_4_TOLERANCE
        figures.append(Figure("Figure 4", f"{model}, {kind}", "%", printed, counted, met))
    return figures


def recount() -> list[Figure]:
    """Counts all three models and gives every figure of the paper that can be recounted."""
    dit, video, audio = dit_step(), open_sora_step(), stable_audio_step()
    return [
        *table_1(dit),
        *table_2(video),
        *table_3(audio),
        *figure_4("DiT-XL/2", dit),
        *figure_4("Open-Sora v1.2", video),
        *figure_4("Stable Audio Open", audio),
    ]


def report(figures: Sequence[Figure]) -> str:
    """Gives the figures as a text table, those out of tolerance marked."""
    lines = [f"{'':26}  {'':30} {'printed':>9} {'counted':>9}  difference"]
    for figure in figures:
        if figure.unit == "%":
            difference = f"{figure.counted - figure.printed:+.2f} points"
        else:
            difference = f"{figure.counted / figure.printed - 1:+.2%}"
        lines.append(
            f"{figure.source:26}  {figure.name:30} {figure.printed:9.2f} {figure.counted:9.2f}"
            f"  {difference}{'' if figure.met else '  OUT OF TOLERANCE'}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the report; gives the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    options = parser.parse_args(arguments)
    figures = recount()
    print(report(figures))
    missed = [figure for figure in figures if not figure.met]
    print(f"{len(figures) - len(missed)} of {len(figures)} figures are met.")
    if options.json is not None:
        document = {"figures": [asdict(figure) for figure in figures]}
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
