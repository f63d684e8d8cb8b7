"""Vision-language models stream their language model: images in the batch, head and loss left to the wrapper."""

from typing import Any

import pytest
import torch
import transformers
from support.streamed_layers import counted_layers
from torch import Tensor, nn

from fourfold.parallel.stream import stream_backprop, token_logprobs
from fourfold.parallel.testing.compare import assert_gradients, gradients
from fourfold.parallel.testing.tiny_models import SMALL, batch

LOSS_TOLERANCE, TOLERANCE = 1e-6, 2e-6  # as in test_stream_backprop.py
CHUNKS = {"chunk_size": 6, "mlp_chunk": 4, "logits_chunk": 5}
ROTARY = {"rope_type": "default", "rope_theta": 1e4}
IMAGE, START, END = 90, 91, 92


def qwen(kind: str, sections: list[int], **vision: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model, and two rows of 20 tokens, each with an image of 4 by 4 patches, which are 4 tokens."""
    text = {**SMALL, "head_dim": 2 * sum(sections), "rope_parameters": {**ROTARY, "mrope_section": sections}}
    common = {"depth": 2, "patch_size": 4, "temporal_patch_size": 1, "spatial_merge_size": 2, "in_channels": 3}
    config = getattr(transformers, f"{kind}Config")(
        text_config=text, vision_config={**common, **vision}, image_token_id=IMAGE,
        vision_start_token_id=START, vision_end_token_id=END,
    )  # fmt: skip
    ids = batch(2, 20, vocab=IMAGE)
    ids[:, 5], ids[:, 6:10], ids[:, 10] = START, IMAGE, END
    grid = torch.tensor([[1, 4, 4], [1, 4, 4]])
    pixels = torch.randn(32, 3 * 16, generator=torch.Generator().manual_seed(1))
    kinds = (ids == IMAGE).int()
    model = getattr(transformers, f"{kind}ForConditionalGeneration")._from_config(config, attn_implementation="sdpa")
    return model, {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": kinds}


def mistral3() -> tuple[nn.Module, dict[str, Tensor]]:
    vision = {
        "model_type": "pixtral", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 2, "head_dim": 8, "patch_size": 4, "image_size": 16,
    }  # fmt: skip
    text = {**SMALL, "head_dim": 16, "model_type": "mistral", "sliding_window": 7}
    config = transformers.Mistral3Config(
        text_config=text, vision_config=vision, image_token_id=IMAGE, spatial_merge_size=2, vision_feature_layer=-1,
    )  # fmt: skip
    ids = batch(2, 20, vocab=IMAGE)
    ids[:, 6:10] = IMAGE
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    model = transformers.Mistral3ForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    return model, {"input_ids": ids, "pixel_values": pixels, "image_sizes": torch.tensor([[16, 16], [16, 16]])}


SIZES = {"hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32, "num_heads": 2}
MODELS = {
    "qwen2_vl": lambda: qwen("Qwen2VL", [2, 1, 1], embed_dim=16, hidden_size=32, num_heads=2),
    "qwen2_5_vl": lambda: qwen(
        "Qwen2_5_VL", [2, 1, 1], **SIZES, fullatt_block_indexes=[0], window_size=8
    ),
    "qwen3_vl": lambda: qwen(
        "Qwen3VL", [2, 3, 3], **SIZES, num_position_embeddings=16, deepstack_visual_indexes=[0, 1]
    ),
    "mistral3": mistral3,
}  # fmt: skip


def made(kind: str) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    model, arguments = MODELS[kind]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.train(), {**arguments, "labels": arguments["input_ids"]}


@pytest.mark.parametrize("kind", MODELS)
def test_the_language_model_streams_with_images_in_the_batch(kind):
    model, arguments = made(kind)
    plain_loss = model(**arguments).loss
    plain = gradients(model, plain_loss)
    assert any(".visual." in name or "vision_tower" in name for name in plain)
    stream_backprop(model, **CHUNKS)
    with counted_layers() as layers:
        loss = model(**arguments).loss
    assert len(layers) == 2
    assert abs(loss - plain_loss) <= LOSS_TOLERANCE * abs(plain_loss)
    assert_gradients(gradients(model, loss), plain, TOLERANCE, kind)


def test_statistics_of_a_wrappers_own_head_are_refused():
    model, arguments = made("mistral3")
    stream_backprop(model, **CHUNKS)
    with pytest.raises(ValueError, match="a head of its own"):
        token_logprobs(model, arguments["input_ids"], arguments["labels"])
