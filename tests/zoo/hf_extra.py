"""What the generic rules of `hf_configs` do not know: settings that must fit one another."""

from __future__ import annotations

from typing import Any

_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_expand": 2, "mamba_n_groups": 1, "mamba_d_state": 16}
_SERIES = {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2], "num_time_features": 1}
_SWIN = {"embed_dim": 32, "num_heads": [2, 2, 4, 4], "depths": [1, 1, 1, 1], "window_size": 7}
_MIMI = {
    "hidden_size": 32,
    "num_filters": 8,
    "vector_quantization_hidden_dimension": 16,
    "codebook_dim": 16,
    "upsample_groups": 32,
    "codebook_size": 32,
}

EXTRA: dict[str, dict[str, Any]] = {
    "align": {
        "vision_config": {"width_coefficient": 0.5, "depth_coefficient": 0.5, "hidden_dim": 640},
        "projection_dim": 160,
        "text_config": {"hidden_size": 160},
    },
    "audio-spectrogram-transformer": {"max_length": 64, "num_mel_bins": 32},
    "autoformer": _SERIES | {"label_length": 2, "moving_average": 3},
    "bamba": _MAMBA | {"attn_layer_indices": [1]},
    "blip-2": {"num_query_tokens": 4},
    "chameleon": {"vocabulary_map": {"<image>": 5, "IMGIMGBA": 6}, "image_token_id": 5},
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "cvt": {"depth": [3, 3, 3], "embed_dim": [16, 32, 64], "num_heads": [1, 2, 4]},
    "dbrx": {
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 2,
        "attn_config": {"kv_n_heads": 2, "attn_pdrop": 0.1},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
    },
    "decision_transformer": {"hidden_size": 64},
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_group": 1, "n_group": 1},
    "dots1": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "moe_intermediate_size": 32,
    },
    "efficientnet": {"width_coefficient": 0.5, "depth_coefficient": 0.5, "hidden_dim": 640},
    "emu3": {"vocabulary_map": {"<image>": 5}, "text_config": {"pad_token_id": 0}},
    "esm": {"vocab_size": 128, "pad_token_id": 1, "mask_token_id": 32},
    "ernie4_5_vl_moe": {
        "text_config": {
            "rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "mrope_section": [3, 3, 2]}
        }
    },
    "falcon_h1": _MAMBA | {"mamba_d_ssm": 128},
    "florence2": {
        "vision_config": {
            "embed_dim": [32, 32, 32, 32],
            "num_heads": [2, 2, 2, 2],
            "num_groups": [2, 2, 2, 2],
            "depths": [1, 1, 1, 1],
            "projection_dim": 64,
        }
    },
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": 128,
        "hidden_size_per_layer_input": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "laurel_rank": 8,
    },
    "gemma4_text": {
        "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": 128,
        "hidden_size_per_layer_input": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "glm4v_moe_text": {"head_dim": 32},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": _MAMBA | {"layer_types": ["mamba", "attention"]},
    "grounding-dino": {"backbone_config": _SWIN},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "informer": _SERIES | {"label_length": 2},
    "janus": {"vq_config": {"base_channels": 32, "embed_dim": 8, "num_embeddings": 32}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "head_dim": 16, "qk_head_dim": 32},
    "lw_detr": {"image_size": 64},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 2, "chunk_size": 8},
    "mask2former": {"backbone_config": _SWIN},
    "mm-grounding-dino": {"backbone_config": _SWIN},
    "mimi": _MIMI,
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 16},
    "nemotron_h": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "ssm_state_size": 16,
        "hybrid_override_pattern": "M*-M",
    },
    "neomme": {"layer_types": ["sliding_attention", "full_attention"]},
    "oneformer": {"backbone_config": _SWIN},
    "perceiver": {"num_latents": 8, "d_latents": 32, "d_model": 32, "num_self_attends_per_block": 2},
    "reformer": {
        "num_hidden_layers": 2,
        "axial_pos_shape": [4, 4],
        "axial_pos_embds_dim": [32, 32],
        "attn_layers": ["local", "lsh"],
        "num_buckets": 2,
        "lsh_attn_chunk_length": 4,
        "local_attn_chunk_length": 4,
    },
    "seggpt": {"image_size": [64, 32]},
    "sapiens2": {"num_key_value_heads_per_layer": [4, 4]},
    "time_series_transformer": _SERIES,
    "tvp": {"backbone_config": {"depths": [1, 1, 1, 1]}},
    "vjepa2": {
        "crop_size": 32,
        "frames_per_clip": 4,
        "pred_hidden_size": 32,
        "pred_num_hidden_layers": 2,
        "pred_num_attention_heads": 2,
        "num_pooler_layers": 1,
    },
    "xmod": {"default_language": "en_XX"},
}
