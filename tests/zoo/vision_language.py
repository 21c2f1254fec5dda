"""Images and text into text."""

from __future__ import annotations

import torch
import transformers as tf

from zoo.architecture import SHAPE, SIZES, Architecture

PATCHES = dict(image_size=32, patch_size=8, **SHAPE)
IMAGE = 3  # the token that an image's patches replace


def with_image(count: int) -> dict[str, torch.Tensor]:
    """Two rows: a token, the image's, five tokens."""
    text = torch.randint(4, 128, (2, count + 6))
    text[:, 1 : count + 1] = IMAGE
    return {"input_ids": text, "pixel_values": torch.randn(2, 3, 32, 32)}


def llava():
    return tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(
            vision_config=tf.CLIPVisionConfig(projection_dim=32, **PATCHES), text_config=tf.LlamaConfig(**SIZES),
            image_token_index=IMAGE, image_token_id=IMAGE, vision_feature_layer=-1,
        )
    )  # fmt: skip


def paligemma():
    return tf.PaliGemmaForConditionalGeneration(
        tf.PaliGemmaConfig(
            vision_config=tf.SiglipVisionConfig(**PATCHES), text_config=tf.GemmaConfig(head_dim=16, **SIZES),
            image_token_index=IMAGE, image_token_id=IMAGE, projection_dim=64, hidden_size=64,
        )
    )  # fmt: skip


def qwen2_vl():
    rope = dict(rope_type="default", mrope_section=[2, 3, 3], rope_theta=10000.0)
    return tf.Qwen2VLForConditionalGeneration(
        tf.Qwen2VLConfig(
            vision_config=dict(depth=2, embed_dim=32, hidden_size=64, mlp_ratio=2, num_heads=2, patch_size=8,
                               spatial_merge_size=2, temporal_patch_size=2, in_channels=3),
            text_config=dict(rope_scaling=rope, rope_parameters=rope, **SIZES),
            image_token_id=IMAGE, video_token_id=120,
            vision_start_token_id=121, vision_end_token_id=122,
        )
    )  # fmt: skip


def qwen2_vl_inputs():
    text = torch.randint(4, 100, (2, 10))
    text[:, 1] = 121
    text[:, 2:6] = IMAGE
    return {
        "input_ids": text,
        "attention_mask": torch.ones_like(text),
        "pixel_values": torch.randn(2 * 16, 3 * 2 * 8 * 8),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
        "mm_token_type_ids": (text == IMAGE).long(),
    }


def idefics3():
    return tf.Idefics3ForConditionalGeneration(
        tf.Idefics3Config(
            vision_config=dict(max_image_size=dict(longest_edge=32), **PATCHES), text_config=tf.LlamaConfig(**SIZES),
            image_token_id=IMAGE, scale_factor=2, pad_token_id=0,
        )
    )  # fmt: skip


def idefics3_inputs():
    found = with_image(4)
    return {**found, "pixel_values": found["pixel_values"][:, None]}


def blip():
    return tf.BlipForConditionalGeneration(
        tf.BlipConfig(
            vision_config=PATCHES,
            text_config=dict(vocab_size=128, encoder_hidden_size=64, max_position_embeddings=32, bos_token_id=1,
                             eos_token_id=2, pad_token_id=0, sep_token_id=2, projection_dim=32, **SHAPE),
            projection_dim=32, image_text_hidden_size=32,
        )
    )  # fmt: skip


def vision_encoder_decoder():
    decoder = tf.BertConfig(
        is_decoder=True, add_cross_attention=True, vocab_size=128, max_position_embeddings=64, **SHAPE
    )
    config = tf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(tf.ViTConfig(**PATCHES), decoder)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    return tf.VisionEncoderDecoderModel(config=config)


VISION_LANGUAGE = {
    "blip": Architecture(
        blip,
        lambda: {"pixel_values": torch.randn(2, 3, 32, 32), "input_ids": torch.randint(3, 128, (2, 6))},
        generates=True,
        dynamic=False,
    ),
    "idefics3": Architecture(idefics3, idefics3_inputs, generates=True, dynamic=False),
    "llava": Architecture(llava, lambda: with_image(16), generates=True, dynamic=False),
    "paligemma": Architecture(paligemma, lambda: with_image(16), generates=True, dynamic=False),
    "qwen2_vl": Architecture(qwen2_vl, qwen2_vl_inputs, generates=True, dynamic=False),
    "vision_encoder_decoder": Architecture(
        vision_encoder_decoder,
        lambda: {"pixel_values": torch.randn(2, 3, 32, 32), "decoder_input_ids": torch.randint(3, 128, (2, 5))},
        generates=True,
        dynamic=False,
    ),
}
