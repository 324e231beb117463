from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from smoothcache.model.costs import MacCounter, human_macs, nbytes

CONTEXTS = {"grad": nullcontext, "no_grad": torch.no_grad, "inference": torch.inference_mode}
Counts = tuple[int, int, int]


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


def layer(module: nn.Module, *inputs: torch.Tensor) -> Callable[[], object]:
    module.eval()
    return lambda: module(*inputs)


def product(left: torch.Tensor, right: torch.Tensor) -> Callable[[], object]:
    return lambda: left @ right


def sdpa(keys: int = 6, heads: int = 4, **options: object) -> Callable[[], object]:
    """Queries [2, 4, 6, 8]; keys and values [2, heads, keys, 8]."""
    query, key, value = randn(2, 4, 6, 8), randn(2, heads, keys, 8), randn(2, heads, keys, 8)
    return lambda: F.scaled_dot_product_attention(query, key, value, **options)  # type: ignore[arg-type]


def attention_by_bmm() -> Callable[[], object]:
    query, key, value = randn(8, 6, 8), randn(8, 3, 8), randn(8, 3, 8)
    return lambda: torch.bmm(torch.bmm(query, key.mT).softmax(-1), value)


def attention_by_baddbmm() -> Callable[[], object]:
    query, key, value, bias = randn(8, 6, 8), randn(8, 3, 8), randn(8, 3, 8), randn(1, 6, 3)
    return lambda: torch.bmm(torch.baddbmm(bias, query, key.mT).softmax(-1), value)


def attention_by_matmul() -> Callable[[], object]:
    query, key, value = randn(2, 4, 6, 8), randn(2, 4, 3, 8), randn(2, 4, 3, 8)
    return lambda: (query @ key.mT).softmax(-1) @ value


def attention_by_einsum() -> Callable[[], object]:
    query, key, value = randn(2, 6, 4, 8), randn(2, 3, 4, 8), randn(2, 3, 4, 8)

    def run() -> torch.Tensor:
        weights = torch.einsum("bqhd,bkhd->bhqk", query, key).softmax(-1)
        return torch.einsum("bhqk,bkhd->bqhd", weights, value)

    return run


def weights_by_einsum() -> Callable[[], object]:
    x, weight = randn(2, 5, 8), nn.Parameter(randn(6, 8))
    return lambda: torch.einsum("bnd,ed->bne", x, weight)


def multihead(**options: object) -> Callable[[], object]:
    module, x = nn.MultiheadAttention(8, 2, batch_first=True).eval(), randn(2, 5, 8)
    return lambda: module(x, x, x, **options)


def cross_multihead() -> Callable[[], object]:
    module = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x, y = randn(2, 5, 8), randn(2, 3, 8)
    return lambda: module(x, y, y)


def strided() -> torch.Tensor:
    """[2, 5, 8], not contiguous: a linear layer on it is a product and, later, a bias."""
    return randn(2, 8, 5).transpose(1, 2)


ATTENTION = 2 * (2 * 4) * 6 * 3 * 8  # two products, batch x heads, queries, keys, dim
MULTIHEAD = (2 * 5 * 8 * 8 * 4, 2 * 2 * 5 * 5 * 8, 2 * 5 * 8 * 4)
# name: what to run, and (weights, attention, biases) by hand
CASES: dict[str, tuple[Callable[[], Callable[[], object]], Counts]] = {
    "linear 1-d": (lambda: layer(nn.Linear(8, 6), randn(8)), (48, 0, 6)),
    "linear 2-d": (lambda: layer(nn.Linear(8, 6), randn(4, 8)), (4 * 48, 0, 4 * 6)),
    "linear 3-d": (lambda: layer(nn.Linear(8, 6), randn(2, 5, 8)), (10 * 48, 0, 10 * 6)),
    "linear 4-d": (lambda: layer(nn.Linear(8, 6), randn(2, 5, 3, 8)), (30 * 48, 0, 30 * 6)),
    "linear strided": (lambda: layer(nn.Linear(8, 6), strided()), (10 * 48, 0, 10 * 6)),
    "linear without bias 1-d": (lambda: layer(nn.Linear(8, 6, bias=False), randn(8)), (48, 0, 0)),
    "linear without bias 3-d": (
        lambda: layer(nn.Linear(8, 6, bias=False), randn(2, 5, 8)),
        (10 * 48, 0, 0),
    ),
    "linear without bias strided": (
        lambda: layer(nn.Linear(8, 6, bias=False), strided()),
        (10 * 48, 0, 0),
    ),
    "conv 1-d": (lambda: layer(nn.Conv1d(8, 6, 1), randn(2, 8, 5)), (10 * 48, 0, 10 * 6)),
    "conv 2-d": (
        lambda: layer(nn.Conv2d(8, 6, 3, padding=1), randn(2, 8, 5, 7)),
        (2 * 35 * 48 * 9, 0, 2 * 35 * 6),
    ),
    "conv in groups, no bias": (
        lambda: layer(nn.Conv2d(8, 6, 3, padding=1, groups=2, bias=False), randn(2, 8, 5, 7)),
        (2 * 35 * 24 * 9, 0, 0),
    ),
    "conv, patches": (
        lambda: layer(nn.Conv2d(4, 6, 2, stride=2), randn(2, 4, 8, 8)),
        (2 * 16 * 24 * 4, 0, 2 * 16 * 6),
    ),
    "conv 3-d": (
        lambda: layer(nn.Conv3d(4, 6, 2, stride=2), randn(2, 4, 4, 4, 4)),
        (2 * 8 * 24 * 8, 0, 2 * 8 * 6),
    ),
    "conv transposed": (
        lambda: layer(nn.ConvTranspose2d(8, 6, 2, stride=2), randn(2, 8, 5, 7)),
        (2 * 35 * 48 * 4, 0, 2 * 140 * 6),
    ),
    "matrix with vector": (lambda: product(randn(3, 8), randn(8)), (24, 0, 0)),
    "sdpa self": (sdpa, (0, 2 * ATTENTION, 0)),
    "sdpa cross": (lambda: sdpa(keys=3), (0, ATTENTION, 0)),
    "sdpa causal": (lambda: sdpa(is_causal=True), (0, 2 * ATTENTION, 0)),
    "sdpa mask": (
        lambda: sdpa(keys=3, attn_mask=torch.ones(2, 1, 6, 3, dtype=torch.bool)),
        (0, ATTENTION, 0),
    ),
    "sdpa bias": (lambda: sdpa(keys=3, attn_mask=randn(2, 4, 6, 3)), (0, ATTENTION, 0)),
    "attention bmm": (attention_by_bmm, (0, ATTENTION, 0)),
    "attention baddbmm": (attention_by_baddbmm, (0, ATTENTION, 0)),
    "attention matmul": (attention_by_matmul, (0, ATTENTION, 0)),
    "attention einsum": (attention_by_einsum, (0, ATTENTION, 0)),
    "weights einsum": (weights_by_einsum, (10 * 48, 0, 0)),
    "multihead": (multihead, MULTIHEAD),
    "multihead without weights": (lambda: multihead(need_weights=False), MULTIHEAD),
    "multihead cross": (
        cross_multihead,
        (2 * 8 * 8 * (2 * 5 + 2 * 3), 2 * 2 * 5 * 3 * 8, 2 * 8 * (2 * 5 + 2 * 3)),
    ),
    "encoder": (
        lambda: layer(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), randn(2, 5, 8)),
        (MULTIHEAD[0] + 2 * 10 * 8 * 16, MULTIHEAD[1], MULTIHEAD[2] + 10 * (8 + 16)),
    ),
    "bmm of another type": (
        lambda: product(randn(2, 3, 4).bfloat16(), randn(2, 4, 5).bfloat16()),
        (0, 2 * 3 * 4 * 5, 0),
    ),
    "nothing counted": (lambda: layer(nn.LayerNorm(8), randn(2, 8)), (0, 0, 0)),
}


if "enable_gqa" in str(F.scaled_dot_product_attention.__doc__):  # torch 2.5
    CASES["sdpa grouped queries"] = (
        lambda: sdpa(keys=3, heads=2, enable_gqa=True),
        (0, ATTENTION, 0),
    )


def counts(counter: MacCounter) -> Counts:
    assert counter.total == counter.weights + counter.attention
    return counter.weights, counter.attention, counter.biases


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_mode_left() -> Iterator[None]:
    assert _get_current_dispatch_mode() is None
    yield
    assert _get_current_dispatch_mode() is None


@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("make", "expected"), CASES.values(), ids=CASES)
def test_counts_are_those_by_hand(make, expected, device, context) -> None:
    with torch.device(device):
        run = make()
    with context(), MacCounter() as counter:
        run()
    assert counts(counter) == expected


@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)
@pytest.mark.parametrize("make", [case[0] for case in CASES.values()], ids=CASES)
def test_results_are_bit_identical(make, context) -> None:
    run = make()
    with context():
        plain = run()
        with MacCounter():
            counted = run()
    for before, after in zip(_flat(plain), _flat(counted), strict=True):
        assert torch.equal(before, after)
        assert before.stride() == after.stride()
        assert before.requires_grad == after.requires_grad
        assert before.is_inference() == after.is_inference()


def _flat(output: object) -> list[torch.Tensor]:
    outputs = output if isinstance(output, tuple) else (output,)
    return [tensor for tensor in outputs if tensor is not None]


@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_half_precision_and_autocast_cost_the_same(device, context) -> None:
    with torch.device(device):
        block = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 8, bias=False)).bfloat16()
        full, x = nn.Linear(8, 6), randn(2, 5, 8)
    with context(), MacCounter() as counter:
        block(x.bfloat16())
    assert counts(counter) == (2 * 10 * 48, 0, 60)
    if device == "cpu":
        with context(), torch.autocast("cpu", torch.bfloat16), MacCounter() as counter:
            full(x)
        assert counts(counter) == (10 * 48, 0, 60)
    with torch.device(device):
        q = randn(2, 4, 6, 8).bfloat16()
    with context(), MacCounter() as counter:
        F.scaled_dot_product_attention(q, q, q)
    assert counts(counter) == (0, 2 * ATTENTION, 0)


def test_gradients_are_bit_identical_and_counted() -> None:
    linear, x = nn.Linear(8, 6), randn(4, 8)
    linear(x).sum().backward()
    plain = linear.weight.grad
    linear.zero_grad()
    with MacCounter() as counter:
        linear(x).sum().backward()
    assert torch.equal(plain, linear.weight.grad)
    assert counter.total == 2 * 4 * 48  # the product, and the gradient of its weights


def test_a_tiny_diffusers_dit() -> None:
    diffusers = pytest.importorskip("diffusers")
    batch, tokens, dim, layers, classes = 2, 16, 16, 3, 10
    found = {}
    for device in ("cpu", "meta"):
        with torch.device(device):
            model = diffusers.DiTTransformer2DModel(
                num_attention_heads=2,
                attention_head_dim=8,
                in_channels=4,
                out_channels=8,
                num_layers=layers,
                sample_size=8,
                patch_size=2,
                num_embeds_ada_norm=classes,
            ).eval()
            inputs = {
                "hidden_states": randn(batch, 4, 8, 8),
                "timestep": torch.full((batch,), 500),
                "class_labels": torch.zeros(batch, dtype=torch.long),
            }
        with torch.inference_mode(), MacCounter() as counter:
            counted = model(**inputs).sample
        found[device] = counts(counter)
        if device == "cpu":
            with torch.inference_mode():
                assert torch.equal(model(**inputs).sample, counted)
    block = batch * tokens * (4 + 8) * dim * dim
    embedder = batch * (256 * dim + dim * dim + dim * 6 * dim)  # one in every block
    head = batch * (256 * dim + dim * dim + dim * 2 * dim) + batch * tokens * dim * 2 * 2 * 8
    patches = batch * tokens * 4 * 2 * 2 * dim
    biases = layers * batch * (tokens * (4 + 5) * dim + (1 + 1 + 6) * dim)
    biases += batch * (1 + 1 + 2) * dim + batch * tokens * (2 * 2 * 8 + dim)
    expected = (
        layers * (block + embedder) + head + patches,
        layers * batch * 2 * tokens * tokens * dim,
        biases,
    )
    assert found == {"cpu": expected, "meta": expected}


def test_counts_can_be_read_while_it_runs() -> None:
    first, second, x = nn.Linear(8, 6), nn.Linear(6, 4), randn(2, 8)
    with torch.no_grad(), MacCounter() as counter:
        assert counter.total == 0
        x = first(x)
        assert counter.total == 2 * 48
        second(x)
        assert counter.total == 2 * (48 + 24)
        assert repr(counter) == "MacCounter(144 MACs)"
    second(x)
    assert counter.total == 2 * (48 + 24)


def test_counters_nest_and_can_be_entered_again() -> None:
    linear, x = nn.Linear(8, 6), randn(2, 8)
    with torch.inference_mode():
        with MacCounter() as outer:
            linear(x)
            with MacCounter() as inner, outer:
                linear(x)
            linear(x)
        assert (outer.total, inner.total) == (3 * 96, 96)
        with outer:
            linear(x)
        assert outer.total == 96


def test_an_exception_leaves_no_mode_active() -> None:
    linear, x = nn.Linear(8, 6), randn(2, 8)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), MacCounter() as counter:
        linear(x)
        linear(linear(x))
    assert _get_current_dispatch_mode() is None
    assert counter.total == 2 * 96
    linear(x)
    assert counter.total == 2 * 96
    with torch.inference_mode(), pytest.raises(ValueError, match="mine"), counter:
        raise ValueError("mine")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensors_pass() -> None:
    layer = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    with torch.no_grad():
        x = torch._nested_tensor_from_mask(randn(2, 5, 8), torch.ones(2, 5, dtype=torch.bool))
        with MacCounter() as counter:
            layer(x, x, x, need_weights=False)
    assert counts(counter) == MULTIHEAD


@pytest.mark.parametrize(
    ("macs", "text"),
    [
        (0, "0 MACs"),
        (999, "999 MACs"),
        (1000, "1.00 KMACs"),
        (999_994, "999.99 KMACs"),
        (999_995, "1.00 MMACs"),
        (366_060_000_000_000, "366.06 TMACs"),
        (4e18, "4000.00 PMACs"),
    ],
)
def test_human_macs(macs: float, text: str) -> None:
    assert human_macs(macs) == text


def test_nbytes() -> None:
    half, full = torch.zeros(3, dtype=torch.bfloat16), torch.zeros(2, 2, device="meta")
    assert nbytes(half) == 6
    assert nbytes(None) == 0
    assert nbytes((None, half, {"a": [full], "b": "text", "c": 1})) == 22
    assert nbytes((half, half)) == 6


@pytest.fixture(scope="module")
def paper_costs() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "paper_costs.py"
    spec = importlib.util.spec_from_file_location("paper_costs", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore:.*Transformer2DModelOutput:FutureWarning")  # of diffusers
def test_the_papers_costs_are_met(paper_costs, tmp_path, capsys, monkeypatch) -> None:
    pytest.importorskip("diffusers")
    file = tmp_path / "costs.json"
    assert paper_costs.main(["--json", str(file)]) == 0
    figures = json.loads(file.read_text())["figures"]
    assert all(figure["met"] for figure in figures)
    table1 = [figure for figure in figures if figure["source"].startswith("Table 1")]
    assert len(table1) == 13
    assert all(abs(figure["counted"] / figure["printed"] - 1) <= 0.004 for figure in table1)
    assert "365.59" in capsys.readouterr().out
    monkeypatch.setattr(paper_costs, "TABLE_3_NO_CACHE", 210.1)
    assert paper_costs.main([]) == 1
    assert capsys.readouterr().out.count("OUT OF TOLERANCE") == 1
