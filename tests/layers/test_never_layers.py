"""What must never be a layer."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch
from zoo import all_models

import smoothcache as sc


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


CONDITIONING = re.compile(
    r"t_embedder|time_(?!attn).*|.*_embed|.*_embed_.*|.*_embeds?|.*_embedd(er|ing)s?|embed(ding)?s?"
    r"|norm.*|.*_norm\d*|adaLN.*|ada_?ln.*|.*modulation.*|scale_shift.*|pos_.*|rope"
)


@pytest.mark.parametrize("name", all_models())
@pytest.mark.filterwarnings("ignore")
def test_conditioning_is_never_a_layer_of_a_real_architecture(name: str) -> None:
    model = all_models()[name].build()
    for granularity in ("auto", "layer", "block"):
        try:
            layers = sc.find_layers(model, granularity=granularity)  # type: ignore[arg-type]
        except sc.LayersNotFoundError:
            assert granularity == "layer"
            continue
        for layer in layers:
            parts = layer.path.split(".")
            assert not [part for part in parts if CONDITIONING.fullmatch(part)], layer.path
            assert layer.path == layer.block or layer.path.startswith(f"{layer.block}.")


def test_the_names_of_conditioning_are_seen() -> None:
    """So that the test above can fail."""
    for name in (
        "t_embedder",
        "time_embed",
        "time_mlp",
        "x_embedder",
        "pos_embed",
        "text_embedding",
        "patch_embed",
        "norm1",
        "norm_out",
        "adaLN_modulation",
        "modulation",
        "img_modulation",
        "scale_shift_table",
    ):
        assert CONDITIONING.fullmatch(name), name
    for name in ("attn", "temporal_attn", "time_attn", "mlp", "ff", "blocks", "0", "transformer"):
        assert not CONDITIONING.fullmatch(name), name
