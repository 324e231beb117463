"""Outputs of any type."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from diffusers.utils import BaseOutput
from support.block_models import outputs, predictors
from torch import Tensor, nn

import smoothcache as sc


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@dataclass
class Output(BaseOutput):
    """As the models of diffusers return it."""

    sample: Tensor
    extra: Any = None


@dataclass
class Plain:
    sample: Tensor
    note: str = "a"
    scale: float = 1.0
    nothing: None = None


@dataclass(frozen=True)
class Frozen:
    sample: Tensor
    more: tuple[Any, ...] = ()
    note: str = "a"


@dataclass(frozen=True, slots=True)
class Slotted:
    sample: Tensor
    note: str = "a"


@dataclass
class Derived:
    sample: Tensor
    twice: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.twice = 2 * self.sample


class Named(NamedTuple):
    sample: Tensor
    count: int


class MoreNamed(Named):
    pass


OUTPUTS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda x: x,
    "tuple": lambda x: (x,),
    "nothing first": lambda x: (None, x),
    "list": lambda x: [x, 2 * x],
    "dict": lambda x: {"sample": x, "flag": True},
    "ordered dict": lambda x: OrderedDict(sample=x, other=[None, x + 1]),
    "output": lambda x: Output(sample=x),
    "output of several": lambda x: Output(sample=x, extra=(x + 1, None)),
    "dataclass": lambda x: Plain(x, "b", 2.0),
    "frozen dataclass": lambda x: Frozen(x, (x + 1, None, 3), "b"),
    "slotted dataclass": lambda x: Slotted(x, "b"),
    "derived dataclass": lambda x: Derived(x),
    "named tuple": lambda x: Named(x, 3),
    "derived named tuple": lambda x: MoreNamed(x, 3),
    "nested": lambda x: {"a": (x, [Named(x + 1, 2)]), "b": None},
}
FALLING = [800.0, 600.0, 400.0, 200.0]
every_output = pytest.mark.parametrize("kind", OUTPUTS)


class Returning(nn.Module):
    """Scales what it is given by the time, and returns that in some form."""

    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self._make = make

    def forward(self, x: Tensor, t: Tensor) -> Any:
        return self._make(self.weight * x * t)


def as_plain(value: Any) -> Any:
    """An output as nested tuples, for comparison."""
    if isinstance(value, Tensor):
        return value.flatten().tolist()
    if hasattr(value, "__dataclass_fields__"):
        return [(name, as_plain(getattr(value, name))) for name in value.__dataclass_fields__]
    if isinstance(value, dict):
        return [(name, as_plain(item)) for name, item in value.items()]
    if isinstance(value, list | tuple):
        return [as_plain(item) for item in value]
    return value


def scaled(make: Callable[[Tensor], Any], time: float) -> Any:
    return make(torch.arange(1.0, 5.0).reshape(1, 4) * time)


@every_output
@predictors
def test_outputs_of_any_type(kind: str, predictor: str) -> None:
    make = OUTPUTS[kind]
    got, run = outputs(Returning(make), predictor, FALLING)
    assert run.summary().reused == 2 and run.summary().held_bytes == 0
    expected = [800.0, 600.0, 600.0, 600.0] if predictor == "hold" else FALLING
    for value, time in zip(got, expected, strict=True):
        assert type(value) is type(scaled(make, time))
        assert as_plain(value) == as_plain(scaled(make, time))
    if isinstance(got[2], Output):
        assert got[2][0] is got[2].sample and got[2]["sample"] is got[2].sample


def spoil(value: Any) -> None:
    """Writes into every tensor of an output."""
    if isinstance(value, Tensor):
        value.fill_(-1.0)
    elif hasattr(value, "__dataclass_fields__"):
        for name in value.__dataclass_fields__:
            spoil(getattr(value, name))
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            spoil(item)


@every_output
@predictors
def test_any_output_may_be_written_into(kind: str, predictor: str) -> None:
    class Spoiled(Returning):
        def __call__(self, *args: Any) -> Any:
            output = super().__call__(*args)
            seen.append(as_plain(output))
            spoil(output)
            return output

    seen: list[Any] = []
    expected, _ = outputs(Returning(OUTPUTS[kind]), predictor, FALLING)
    outputs(Spoiled(OUTPUTS[kind]), predictor, FALLING)
    assert seen == [as_plain(value) for value in expected]


@pytest.mark.parametrize(
    "make",
    [lambda x: {"a": Plain(x), "b": x + 1}, lambda x: Output(x + 1, extra=Plain(x))],
    ids=["in a dict", "in an output"],
)
def test_a_dataclass_inside_another_output(make: Callable[[Tensor], Any]) -> None:
    got, _ = outputs(Returning(make), "taylor", FALLING)
    for value, time in zip(got, FALLING, strict=True):
        assert as_plain(value) == as_plain(scaled(make, time))


def test_a_tuple_of_dataclasses() -> None:
    got, _ = outputs(Returning(lambda x: (Plain(x),)), "hold", [800.0, 600.0, 400.0])
    assert as_plain(got[2]) == as_plain((Plain(torch.arange(1.0, 5.0) * 600),))


@dataclass
class HomeMade(OrderedDict):  # type: ignore[type-arg]
    """Like the outputs of diffusers, which register theirs with PyTorch; this one does not."""

    sample: Any = None

    def __post_init__(self) -> None:
        self["sample"] = self.sample


class MadeByHand(dict):  # type: ignore[type-arg]
    """A mapping whose items are attributes too, unknown to PyTorch."""

    def __init__(self, **items: Any) -> None:
        super().__init__(items)
        self.__dict__.update(items)


@pytest.mark.parametrize("make", [HomeMade, MadeByHand])
def test_an_output_that_is_a_mapping_with_attributes(make: Callable[..., Any]) -> None:
    got, run = outputs(Returning(lambda x: make(sample=x)), "taylor", FALLING)
    for value, time in zip(got, FALLING, strict=True):
        assert value.sample.flatten().tolist() == [k * time for k in range(1, 5)]
        assert value["sample"] is value.sample and type(value) is make
    assert run.summary().peak_bytes == 2 * got[0].sample.nbytes


def test_a_tensor_in_two_places_of_an_output_is_one() -> None:
    got, run = outputs(Returning(lambda x: (x, {"again": x}, x[:])), "hold", FALLING)
    for first, mapping, other in got:
        assert mapping["again"] is first is not other
    assert run.summary().peak_bytes == 2 * got[0][0].nbytes


def test_tensors_in_an_object_that_cannot_be_taken_apart_are_refused() -> None:
    model = Returning(lambda x: (x, SimpleNamespace(extra=[x + 1])))
    words = "a SimpleNamespace whose tensors cannot be replaced"
    with pytest.raises(sc.ScheduleMismatchError, match=words):
        outputs(model, "hold", FALLING)


@pytest.mark.parametrize(
    "make", [lambda x: None, lambda x: 3.0, lambda x: "text", lambda x: SimpleNamespace(sample=x)]
)
def test_an_output_without_tensors_is_refused(make: Callable[[Tensor], Any]) -> None:
    model = Returning(make)
    before = dict(vars(model))
    name = type(make(torch.zeros(1))).__name__
    with pytest.raises(sc.ScheduleMismatchError, match=rf"returned no tensor but {name}.*leave it"):
        outputs(model, "hold", [800.0, 600.0, 400.0])
    assert type(model) is Returning and vars(model) == before


def test_the_refusal_names_the_model() -> None:
    with pytest.raises(sc.ScheduleMismatchError, match=r"^'?(the model|Returning)"):
        outputs(Returning(lambda x: None), "hold", [800.0, 600.0, 400.0])
