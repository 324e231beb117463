"""All layers of a model that run under a schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise

from torch import nn

from ..layers.layer import is_followed, is_residual
from ..layers.modules import layer_modules
from ..model.target import Target
from ..schedule.schedule import Schedule
from ..steps.predictors import axis_positions
from .call import Call
from .reused_layer import ReusedLayer
from .row_plan import RowPlan
from .summary import Tally


class ReusedLayers:
    """The layers of a schedule, by path and by denoiser.

    Args:
        target: The model.
        schedule: Schedule bound to the model's layers.
        tally: Counters of the run.
        check_finite: Keep no value with a NaN or infinity.
        on_host: Keep values in host memory.
        on_outside: Called with the path of a layer that runs while its denoiser does not.

    Attributes:
        by_path: Layers by path.
        by_denoiser: Layers of each denoiser by its prefix, in the order of the schedule.
        call_of: Current call of each denoiser by its prefix; one denoiser may call another.
        modules: Modules by path.

    Raises:
        ScheduleMismatchError: If the model has no module at some path.
    """

    def __init__(
        self,
        target: Target,
        schedule: Schedule,
        tally: Tally,
        *,
        check_finite: bool,
        on_host: bool,
        on_outside: Callable[[str], None],
    ) -> None:
        layers = schedule.layers or ()
        names = list(target.denoisers)
        self.call_of = {name: Call(on_outside=on_outside) for name in names}
        self.by_denoiser: dict[str, list[ReusedLayer]] = {name: [] for name in names}
        self.by_path: dict[str, ReusedLayer] = {}
        for layer in layers:
            row, denoiser = schedule.rows[layer.path], _denoiser_of(layer.path, names)
            plan = RowPlan(
                layer.path,
                row.computed,
                row.predictor,
                positions=axis_positions(row.axis, schedule.num_steps, schedule.noise_levels),
                gains=row.gains,
                weights=row.weight_tables,
                batch_parts=row.batch_parts,
            )
            reused = ReusedLayer(
                plan,
                self.call_of[denoiser],
                tally,
                residual=is_residual(layer),
                follow=is_followed(layer),
                check_finite=check_finite,
                on_host=on_host,
            )
            self.by_path[layer.path] = reused
            self.by_denoiser[denoiser].append(reused)
        for chain in self.by_denoiser.values():
            for reused, following in pairwise(chain):
                reused.following = following
        self.modules = layer_modules(target, list(layers))
        self._nest(self.modules)

    def _nest(self, modules: Mapping[str, nn.Module]) -> None:
        """Sets the nested layers of every layer, including modules that have several paths."""
        layers = {module: self.by_path[path] for path, module in modules.items()}
        for outer, layer in layers.items():
            within = (x for x in outer.modules() if x is not outer)
            layer.inner = [layers[x] for x in within if x in layers]

    def __iter__(self) -> Iterator[ReusedLayer]:
        return iter(self.by_path.values())

    def begin_generation(self) -> None:
        """Resets which layers ran, and drops all values."""
        for layer in self:
            layer.ran_before |= layer.ran
            layer.ran = False
        self.forget()

    def forget(self) -> None:
        """Drops all values."""
        for layer in self:
            layer.forget()

    def never_ran(self) -> tuple[str, ...]:
        """Returns the paths of the layers that have not run in any generation."""
        return tuple(layer.path for layer in self if not layer.ever_ran)

    def idle(self) -> list[str]:
        """Returns the paths of the layers that have not run in this generation."""
        return [layer.path for layer in self if not layer.ran]


def _denoiser_of(path: str, denoisers: Iterable[str]) -> str:
    """Returns the prefix of a layer's denoiser; a single denoiser has an empty prefix."""
    return next(name for name in denoisers if f"{path}.".startswith(f"{name}." * bool(name)))
