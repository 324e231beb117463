"""The one file that alters modules: what it leaves alone, and what it gets along with."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.toys import InstanceForwardMlp, Mlp
from torch import Tensor, nn

from smoothcache.tracking.intercept import intercept, is_intercepted, release


def doubled(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return 2 * forward(*args, **kwargs)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 8)


@pytest.mark.parametrize("kind", [Mlp, InstanceForwardMlp])
def test_calls_and_direct_calls_of_forward_are_intercepted(kind: type[Mlp], x: Tensor) -> None:
    module = kind(8)
    plain = module(x)
    intercept(module, doubled)
    assert torch.equal(module(x), 2 * plain)
    assert torch.equal(module.forward(x), 2 * plain)
    assert is_intercepted(module)
    release(module)
    assert torch.equal(module(x), plain)
    assert type(module) is kind
    assert not is_intercepted(module)


def test_names_and_signature_stay() -> None:
    module = Mlp(8)
    before = (
        type(module).__name__,
        type(module).__qualname__,
        type(module).__module__,
        repr(module),
    )
    signature = inspect.signature(module.forward)
    intercept(module, doubled)
    now = type(module)
    assert (now.__name__, now.__qualname__, now.__module__, repr(module)) == before
    assert inspect.signature(module.forward) == signature
    assert issubclass(now, Mlp)


def test_another_module_of_the_class_is_not_intercepted(x: Tensor) -> None:
    module, other = Mlp(8), Mlp(8)
    other.load_state_dict(module.state_dict())
    intercept(module, doubled)
    assert torch.equal(module(x), 2 * other(x))
    assert type(other) is Mlp


def test_hooks_before_and_after_run_around_it(x: Tensor) -> None:
    seen: list[str] = []
    module = Mlp(8)
    module.register_forward_hook(lambda *_: seen.append("before"))
    intercept(module, doubled)
    late = module.register_forward_hook(lambda *_: seen.append("after"))
    module(x)
    assert seen == ["before", "after"]
    release(module)
    module(x)
    assert seen == ["before", "after"] * 2
    late.remove()
    module(x)
    assert seen[4:] == ["before"]


def wrap_forward(module: nn.Module, factor: float) -> None:
    """What accelerate and the hooks of diffusers do."""
    old = module.forward
    module._old_forward = old  # type: ignore[assignment]

    def new_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return factor * module._old_forward(*args, **kwargs)  # type: ignore[operator]

    module.forward = functools.update_wrapper(functools.partial(new_forward, module), old)  # type: ignore[method-assign]


def unwrap_forward(module: nn.Module) -> None:
    module.forward = module._old_forward  # type: ignore[method-assign]
    del module._old_forward


@pytest.mark.parametrize("kind", [Mlp, InstanceForwardMlp])
def test_a_wrapper_that_was_there_first(kind: type[Mlp], x: Tensor) -> None:
    module = kind(8)
    plain = module(x)
    wrap_forward(module, 3.0)
    wrapper = module.forward
    intercept(module, doubled)
    assert torch.allclose(module(x), 6 * plain)
    release(module)
    assert module.forward is wrapper
    assert torch.allclose(module(x), 3 * plain)
    unwrap_forward(module)
    assert torch.equal(module(x), plain)


@pytest.mark.parametrize("kind", [Mlp, InstanceForwardMlp])
@pytest.mark.parametrize("first", ["released", "unwrapped"])
def test_a_wrapper_that_came_later(kind: type[Mlp], first: str, x: Tensor) -> None:
    module = kind(8)
    plain = module(x)
    intercept(module, doubled)
    wrap_forward(module, 3.0)
    assert torch.allclose(module(x), 6 * plain)
    if first == "released":
        release(module)
        assert torch.allclose(module(x), 3 * plain)
        unwrap_forward(module)
    else:
        unwrap_forward(module)
        assert torch.equal(module(x), 2 * plain)
        release(module)
    assert torch.equal(module(x), plain)
    assert type(module) is kind


@pytest.mark.parametrize("kind", [Mlp, InstanceForwardMlp])
def test_a_wrapper_that_outlasts_two_interceptions(kind: type[Mlp], x: Tensor) -> None:
    module = kind(8)
    plain = module(x)
    intercept(module, doubled)
    wrap_forward(module, 3.0)
    release(module)
    intercept(module, doubled)
    assert torch.allclose(module(x), 6 * plain)
    release(module)
    unwrap_forward(module)
    assert torch.equal(module(x), plain)


@pytest.mark.parametrize("kind", [Mlp, InstanceForwardMlp])
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_copies_are_plain(kind: type[Mlp], copied: Callable[[Any], Any], x: Tensor) -> None:
    module = kind(8)
    plain = module(x)
    intercept(module, doubled)
    twin = copied(module)
    assert type(twin) is kind
    assert not is_intercepted(twin)
    assert torch.equal(twin(x), plain)
    assert is_intercepted(module)
    release(module)


def test_a_module_whose_class_cannot_be_swapped_is_left_as_it_was() -> None:
    class Final(nn.Module):
        def __init_subclass__(cls) -> None:
            raise TypeError("no subclasses")

        def forward(self, x: Tensor) -> Tensor:
            return x

    module = Final()
    module.forward = module.forward  # type: ignore[method-assign]
    before = dict(module.__dict__)
    with pytest.raises(TypeError, match="no subclasses"):
        intercept(module, doubled)
    assert module.__dict__ == before
    assert type(module) is Final


def test_moving_and_casting_while_intercepted() -> None:
    module = Mlp(8)
    intercept(module, doubled)
    module.to(torch.float64).eval().requires_grad_(False)
    out = module(torch.zeros(1, 8, dtype=torch.float64))
    release(module)
    assert torch.equal(out, 2 * module(torch.zeros(1, 8, dtype=torch.float64)))
    assert not module.training
