"""Which layers are eligible, drawn for any model."""

from __future__ import annotations

from diffusers import DiTTransformer2DModel, FluxTransformer2DModel

from smoothcache import find_layers
from smoothcache.plots import plot_eligible_layers
from smoothcache.plots.eligible import Box, columns_of


def test_a_kind_of_blocks_is_one_column() -> None:
    model = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, num_layers=3)
    whole, block = columns_of(model, find_layers(model))
    assert whole.title == "DiTTransformer2DModel"
    assert Box("transformer_blocks", "ModuleList", "blocks", 3) in whole.boxes
    assert {box.kind for box in whole.boxes} == {None, "blocks"}
    assert block.title == "BasicTransformerBlock\n× 3"
    assert {box.name: box.kind for box in block.boxes} == {
        **{"norm1": None, "attn1": "self_attn", "norm3": None, "ff": "ffn"}
    }


def test_blocks_that_are_reused_as_a_whole() -> None:
    model = FluxTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, num_single_layers=2,
        in_channels=4, joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    _, double, single = columns_of(model, find_layers(model))
    assert double.kind is None and single.kind == "block"
    assert single.title == "FluxSingleTransformerBlock\n× 2"
    figure = plot_eligible_layers(model, title="FLUX")
    assert figure.legends[0].get_title().get_text() == "FLUX"
    assert "block" in [text.get_text() for text in figure.legends[0].get_texts()]
