"""Images: patches, windows, convolutions, detectors, segmenters."""

from __future__ import annotations

import torch
import transformers as tf

from zoo.architecture import SHAPE, Architecture, ids, pixels

PATCHES = dict(image_size=32, patch_size=8, num_channels=3, **SHAPE)
TEXT = dict(vocab_size=128, max_position_embeddings=32, bos_token_id=1, eos_token_id=2, pad_token_id=0, **SHAPE)
STAGES = dict(hidden_sizes=[16, 32], depths=[1, 1], num_stages=2)


def image(make):
    return Architecture(make, pixels, dynamic=False)


def image_and_text():
    return {**ids(), **pixels()}


def detr():
    backbone = tf.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    return tf.DetrForObjectDetection(
        tf.DetrConfig(
            use_timm_backbone=False, backbone_config=backbone, use_pretrained_backbone=False, backbone=None, d_model=64,
            encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=128, decoder_ffn_dim=128, num_queries=5, num_labels=3,
        )
    )  # fmt: skip


def sam():
    return tf.SamModel(
        tf.SamConfig(
            vision_config=dict(
                hidden_size=64, output_channels=32, num_hidden_layers=2, num_attention_heads=4, image_size=32,
                patch_size=8, mlp_dim=128, window_size=2, global_attn_indexes=[1], num_pos_feats=16,
            ),
            prompt_encoder_config=dict(hidden_size=32, image_size=32, patch_size=8, mask_input_channels=4),
            mask_decoder_config=dict(
                hidden_size=32, mlp_dim=64, num_hidden_layers=2, num_attention_heads=4, iou_head_hidden_dim=32,
            ),
        )
    )  # fmt: skip


VISION = {
    "beit": image(lambda: tf.BeitModel(tf.BeitConfig(use_relative_position_bias=True, **PATCHES))),
    "clip": Architecture(
        lambda: tf.CLIPModel(tf.CLIPConfig(text_config=TEXT, vision_config=PATCHES, projection_dim=32)),
        image_and_text,
        dynamic=False,
    ),
    "clip_text": Architecture(lambda: tf.CLIPTextModel(tf.CLIPTextConfig(**TEXT))),
    "convnext": image(lambda: tf.ConvNextModel(tf.ConvNextConfig(image_size=32, **STAGES))),
    "convnextv2": image(lambda: tf.ConvNextV2ForImageClassification(tf.ConvNextV2Config(image_size=32, **STAGES))),
    "cvt": image(
        lambda: tf.CvtModel(
            tf.CvtConfig(
                embed_dim=[16, 16, 32], num_heads=[1, 1, 2], depth=[1, 2, 3], mlp_ratio=[2.0, 2.0, 2.0],
                drop_path_rate=[0.0, 0.0, 0.0],
            )
        )
    ),
    "deit": image(lambda: tf.DeiTForImageClassification(tf.DeiTConfig(**PATCHES))),
    "detr": image(detr),
    "dinov2": image(lambda: tf.Dinov2Model(tf.Dinov2Config(mlp_ratio=2, **PATCHES))),
    "dpt": image(
        lambda: tf.DPTForDepthEstimation(
            tf.DPTConfig(
                backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[16, 16, 16, 16], fusion_hidden_size=16,
                is_hybrid=False, reassemble_factors=[4, 2, 1, 0.5], **(PATCHES | dict(num_hidden_layers=4)),
            )
        )
    ),
    "hiera": image(
        lambda: tf.HieraModel(
            tf.HieraConfig(
                embed_dim=16, image_size=[32, 32], patch_size=[7, 7], patch_stride=[4, 4], patch_padding=[3, 3],
                mlp_ratio=2.0, depths=[1, 1], num_heads=[1, 2], num_query_pool=1, query_stride=[2, 2],
                masked_unit_size=[4, 4], masked_unit_attention=[True, False],
            )
        )
    ),
    "mobilevit": image(
        lambda: tf.MobileViTModel(
            tf.MobileViTConfig(image_size=32, hidden_sizes=[32, 32, 32], neck_hidden_sizes=[8, 8, 16, 16, 16, 16, 32],
                               num_attention_heads=4, mlp_ratio=2.0)
        )
    ),
    "poolformer": image(
        lambda: tf.PoolFormerModel(
            tf.PoolFormerConfig(
                hidden_sizes=[16, 32], depths=[1, 1], patch_sizes=[7, 3], strides=[4, 2], padding=[2, 1],
                num_encoder_blocks=2, mlp_ratio=2.0,
            )
        )
    ),
    "resnet": image(
        lambda: tf.ResNetForImageClassification(
            tf.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="bottleneck")
        )
    ),
    "sam": Architecture(
        sam,
        lambda: {**pixels(), "input_points": torch.rand(2, 1, 2, 2) * 32, "input_labels": torch.ones(2, 1, 2).int()},
        dynamic=False,
    ),
    "segformer": image(
        lambda: tf.SegformerForSemanticSegmentation(
            tf.SegformerConfig(
                num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[16, 32], patch_sizes=[7, 3],
                strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=32, num_labels=3,
            )
        )
    ),
    "siglip": Architecture(
        lambda: tf.SiglipModel(tf.SiglipConfig(text_config=TEXT, vision_config=PATCHES)), image_and_text, dynamic=False
    ),
    "swin": image(
        lambda: tf.SwinModel(
            tf.SwinConfig(image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4)
        )
    ),
    "swinv2": image(
        lambda: tf.Swinv2Model(
            tf.Swinv2Config(image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4)
        )
    ),
    "videomae": Architecture(
        lambda: tf.VideoMAEModel(tf.VideoMAEConfig(num_frames=4, tubelet_size=2, **PATCHES)),
        lambda: {"pixel_values": torch.randn(2, 4, 3, 32, 32)},
        dynamic=False,
    ),
    "vilt": Architecture(
        lambda: tf.ViltModel(tf.ViltConfig(vocab_size=128, max_position_embeddings=32, max_image_length=16, **PATCHES)),
        image_and_text,
        dynamic=False,
    ),
    "vit_mae": image(
        lambda: tf.ViTMAEModel(
            tf.ViTMAEConfig(decoder_hidden_size=32, decoder_num_hidden_layers=1, mask_ratio=0.0, **PATCHES)
        )
    ),
    "vitdet": image(lambda: tf.VitDetModel(
        tf.VitDetConfig(mlp_ratio=2, window_size=2, window_block_indices=[0], use_relative_position_embeddings=True,
                        **{k: v for k, v in PATCHES.items() if k != "intermediate_size"})
    )),
    "yolos": image(lambda: tf.YolosForObjectDetection(
        tf.YolosConfig(num_detection_tokens=4, num_labels=3, **(PATCHES | dict(image_size=[32, 32])))
    )),
}  # fmt: skip
