"""Hugging Face configurations made tiny by the names of their fields."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from .entry import RATE

HIDDEN, HEADS, HEAD_DIM, LAYERS, VOCABULARY, POSITIONS = 64, 4, 16, 2, 128, 128

_RATE = re.compile(r"drop(?!.*layer)|layer_?drop_?out|pdrop|path_rate")
_WIDTHS: list[tuple[str, int]] = [
    (r"((linear|moe|shared|shared_expert|expert|ffn|ff|mlp|encoder|decoder)_)*intermediate_size|.*intermediate_size", 96),
    (r".*(ffn_dim|d_ff|mlp_dim|ffn_hidden_size|dim_feedforward|feedforward_dim|dff|dim_ff|n_inner|intermediate_dim|d_inner)", 96),
    (r".*(num_key_value_heads|n_kv_heads|num_kv_heads)", 2),
    (r".*(attention_heads|num_heads|n_head|n_heads|key_heads|value_heads|mamba_heads|_heads)", HEADS),
    (r"(.*_)?(head_dim|d_kv|d_head|dim_head|key_value_channels|qk_rope_head_dim|qk_nope_head_dim|v_head_dim)", HEAD_DIM),
    (r"q_lora_rank|kv_lora_rank|o_lora_rank", 32),
    (r"(.*_)?(hidden_size|hidden_dim|d_model|n_embd|embed_dim|emb_dim|dim|embedding_size|embedding_dim|project_dim"
     r"|projection_dim|projection_size|feature_size|mask_feature_size|pooler_output_size|classifier_proj_size"
     r"|codevector_dim|output_dim|vision_output_dim|patch_embed_hidden_size|conv_dim)", HIDDEN),
    (r".*num_(local_)?experts|n_routed_experts|moe_num_experts|num_routed_experts", 4),
]
_ALWAYS: list[tuple[str, int]] = [
    (r"(.*_)?(num_hidden_layers|num_layers|n_layer|n_layers|encoder_layers|decoder_layers|num_encoder_layers"
     r"|num_decoder_layers|depth|num_blocks|layers|attention_layers|num_attention_layers)", LAYERS),
    (r".*vocab_size", VOCABULARY),
    (r"(.*_)?(max_position_embeddings|n_positions|n_ctx|max_seq_len|max_target_positions|max_sequence_length)", POSITIONS),
    (r"max_source_positions", 32),
    (r"num_queries|num_query_tokens|.*num_latents|.*n_latents|two_stage_num_proposals|num_denoising", 8),
    (r".*num_experts_per_tok|moe_topk|moe_k|top_k_experts", 2),
    (r"codebook_size|num_embeddings|.*hash_byte_group_vocab|num_hash_buckets|num_codevectors_per_group", 64),
    (r"n_group|topk_group|.*n_shared_experts|first_k_dense_replace", 1),
]
_TOKENS = re.compile(r".*(_token_id|_token_index|_index|_token_ids|_id)$|(audio|image|video)_token")
_DEPTHS = re.compile(r"(depths?|num_block_repeats|block_sizes|stage_num_blocks|blocks_per_stage|n_attn_blocks)$")


class Shrink:
    """How far to shrink: `widths` also the channel sizes, `image` the image size (None: as it is)."""

    def __init__(self, widths: bool, image: int | None, layers: int = LAYERS) -> None:
        self.widths, self.image, self.layers = widths, image, layers
        self.tokens: dict[str, int] = {}

    def config(self, cls: type, extra: dict[str, Any] | None = None) -> Any:
        """A tiny configuration of class `cls`."""
        return self._made(cls, cls(), extra or {})

    def _made(self, cls: type, default: Any, extra: dict[str, Any]) -> Any:
        chosen: dict[str, Any] = {}
        usual = default if type(default) is not cls else cls()
        for field in dataclasses.fields(cls):
            if not field.init:
                continue
            try:
                value = getattr(default, field.name)
            except Exception:  # a per-layer attribute of a heterogeneous configuration
                continue
            if field.name in extra:
                given = extra[field.name]
                nested = isinstance(given, dict) and dataclasses.is_dataclass(value)
                chosen[field.name] = self._made(type(value), value, given) if nested else given
                continue
            small = self._field(field.name, value, default)
            if small == RATE and field.type in ("int", "int | None", int):
                small = _RATE_LATER
            if small is not _SAME:
                chosen[field.name] = small
            elif value != getattr(usual, field.name, None):
                chosen[field.name] = value  # what the whole says of its part
        config = cls(**{name: value for name, value in chosen.items() if value is not _RATE_LATER})
        for name, value in chosen.items():
            if value is _RATE_LATER:  # the field is typed as an int, and its 0 is a rate
                vars(config)[name] = RATE
        return config

    def _field(self, name: str, value: Any, default: Any) -> Any:
        if hasattr(value, "to_dict") and dataclasses.is_dataclass(value):
            return self._made(type(value), value, {})
        if isinstance(value, bool):
            return _SAME
        if name == "pad_token_id" and value is None and hasattr(default, "vocab_size"):
            return 0
        if "layerdrop" in name or name.startswith(("mask_time_prob", "mask_feature_prob")):
            return 0.0
        if _RATE.search(name) and (value is None or isinstance(value, (int, float))):
            return RATE
        if _RATE.search(name) and isinstance(value, (tuple, list)):
            return type(value)([RATE] * len(value))
        if isinstance(value, int):
            if name in ("num_layers", "num_stages") and any(_has_list(default, value)):
                return _SAME
            if name.endswith("num_key_value_heads") and value == getattr(default, "num_attention_heads", None):
                return HEADS if self.widths else _SAME
            return self._integer(name, value)
        if isinstance(value, (list, tuple)) and value:
            return self._list(name, value, default)
        if isinstance(value, dict) and "rope_theta" in value and self.widths:
            return value | {"mrope_section": [2, 3, 3]}
        if name == "backbone" and value == "resnet50":
            return "resnet18"
        return _SAME

    def _integer(self, name: str, value: int) -> Any:
        if name == "image_size" and self.image:
            return self.image
        for pattern, small in _ALWAYS:
            if re.fullmatch(pattern, name):
                small = self.layers if small == LAYERS and "experts" not in name and "moe" not in name else small
                return min(small, value) if value > 0 else _SAME
        if _TOKENS.fullmatch(name) and value >= VOCABULARY:
            return self.tokens.setdefault(name, VOCABULARY - 1 - len(self.tokens))
        for pattern, small in _WIDTHS if self.widths else ():
            if re.fullmatch(pattern, name):
                return min(small, value) if value > 0 else _SAME
        return _SAME

    def _list(self, name: str, value: Any, default: Any) -> Any:
        if _DEPTHS.fullmatch(name) and all(isinstance(one, int) for one in value):
            return type(value)(1 for _ in value)
        if name == "image_size" and self.image:
            return type(value)(self.image for _ in value)
        layers = vars(default).get("num_hidden_layers")
        if isinstance(layers, int) and len(value) == layers and layers > self.layers:
            return type(value)(value[: self.layers])
        return _SAME


def _has_list(config: Any, length: int) -> Any:
    """Does the configuration list something for each of `length` stages?"""
    for field in dataclasses.fields(config):
        value = vars(config).get(field.name)
        yield isinstance(value, (list, tuple)) and len(value) == length


_SAME, _RATE_LATER = object(), object()
