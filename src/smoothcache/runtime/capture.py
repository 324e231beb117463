"""Runs a layer and captures the value that later steps reuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..errors import ScheduleMismatchError
from ..model import residual_stream
from ..model.outputs import (
    Writes,
    are_finite,
    form_of,
    hides_tensors,
    is_plain,
    taken_apart,
    tensors_given,
)
from ..model.residuals import are_swapped, bases_at, bases_of, copies_of, kept_of
from .host_memory import Parked
from .kept import KeptValue


class Capture:
    """Runs one layer and turns its outputs into kept values.

    Args:
        path: The layer's path, for messages.
        residual: Keep the difference between the module's output and its input.
        follow: Detect in the first call whether the layer adds to its input, and if so keep the
            difference.
        check_finite: Keep no value with a NaN or infinity; costs a host sync per value.
        on_host: Keep values in host memory.

    Attributes:
        found_not_finite: Whether the last output was discarded because it is not finite.
    """

    def __init__(
        self, path: str, *, residual: bool, follow: bool, check_finite: bool, on_host: bool
    ) -> None:
        self._path = path
        self._residual = residual
        self._follow = follow
        self._check_finite = check_finite
        self._on_host = on_host
        self._sources: dict[int, tuple[int | None, ...]] = {}  # by the number of inputs
        self._writes = Writes()
        self.found_not_finite = False

    def run(
        self,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        step: int,
        last_use: int | None,
    ) -> tuple[Any, KeptValue | None]:
        """Runs the layer.

        Returns:
            The output and its kept value; None in place of the latter if nothing can be kept.

        Raises:
            ScheduleMismatchError: If the layer modifies its inputs, which a reuse would not do.
        """
        self.found_not_finite = False
        given = tensors_given(args, kwargs)
        form = form_of(given)
        marks = self._writes.before(given)
        inputs = [x for x in given if x.is_floating_point()]
        sources = self._sources.get(len(inputs), ())
        unknown = self._follow and len(inputs) not in self._sources
        # Copies, because the layer may write into its input.
        copied = range(len(inputs)) if self._residual or unknown else sources
        inputs = copies_of(inputs, copied)
        if unknown:
            output, sources = self._followed(forward, args, kwargs)
        else:
            output = forward(*args, **kwargs)
        written = self._writes.after(given, marks)
        leaves, rebuild = taken_apart(output)
        if written or not isinstance(output, Tensor):
            self._refuse_side_effects(list(written.values()), output, leaves)
        if len(sources) not in (0, len(leaves)):  # the structure of the output has changed
            self._sources.clear()
            return output, None
        if unknown:
            self._sources[len(inputs)] = sources
        swapped: Tensor | None = None
        if self._residual:
            swapped = are_swapped(leaves, inputs)
            bases = bases_of(leaves, inputs, swapped)
        else:
            bases = bases_at(sources, inputs, leaves)
        values = [kept_of(leaf, base) for leaf, base in zip(leaves, bases, strict=True)]
        if self._check_finite and not are_finite(values):
            self.found_not_finite = True
            return output, None
        value = KeptValue(
            step,
            last_use=-1 if last_use is None else last_use,
            leaves=values,
            nbytes=sum([x.nbytes for x in values if isinstance(x, Tensor)]),
            rebuild=rebuild,
            swapped=swapped,
            dtypes=[x.dtype if isinstance(x, Tensor) else None for x in leaves],
            form=form,
            residual=self._residual,
            sources=sources,
            into=[next((i for i, x in written.items() if x is leaf), None) for leaf in leaves],
            is_plain=is_plain(output)
            and not (written or self._residual or sources or self._on_host),
        )
        if self._on_host:
            value.leaves = [Parked(x) if isinstance(x, Tensor) else x for x in values]
        return output, value

    def _followed(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, tuple[int | None, ...]]:
        """Runs the layer; returns its output and the inputs that its leaves add to."""
        output, carried = residual_stream.followed(forward, args, kwargs)
        if carried.is_mixed:
            raise ScheduleMismatchError(residual_stream.sentence(self._path))
        return output, carried.sources

    def _refuse_side_effects(self, written: list[Tensor], output: Any, leaves: list[Any]) -> None:
        name = self._path or "the model"
        if not any(isinstance(leaf, Tensor) for leaf in leaves):
            raise ScheduleMismatchError(
                f"{name!r} returned no tensor but {type(output).__name__}, so a reuse would lose "
                "its changes to the input; leave it out of the schedule"
            )
        if hiding := next(filter(hides_tensors, leaves), None):
            raise ScheduleMismatchError(
                f"{name!r} returned a {type(hiding).__name__} whose tensors cannot be replaced at "
                "reuse (only tuples, lists, mappings and dataclasses are supported); leave it out "
                "of the schedule"
            )
        if {id(x) for x in written} - {id(leaf) for leaf in leaves}:
            raise ScheduleMismatchError(
                f"{name!r} writes into an input tensor in place, which a reuse would lose; leave "
                "it out of the schedule"
            )
