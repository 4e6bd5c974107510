"""Hugging Face configurations made tiny by the names of their fields."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

from .entry import RATE

HIDDEN, HEADS, HEAD_DIM, LAYERS, VOCABULARY, POSITIONS = 64, 4, 16, 2, 128, 128
MROPE = [2, 3, 3]  # half of HEAD_DIM, for time, height and width

_RATE = re.compile(r"drop(?!.*layer)|layer_?drop_?out|pdrop|path_rate")
_LAYERS = re.compile(
    r"(.*_)?(num_hidden_layers|num_layers|n_layers?|encoder_layers|decoder_layers|num_encoder_layers|depth"
    r"|num_decoder_layers|num_blocks|layers|attention_layers|num_attention_layers)"
)
_DEPTHS = re.compile(r"depths?|num_block_repeats|block_sizes|stage_num_blocks|blocks_per_stage|n_attn_blocks")
_PER_LAYER = re.compile(r"layer|index|pattern|window|rope|idx")
_TOKEN = re.compile(r".*(_token_id|_token_index|_index|_token_ids|_id)|(audio|image|video)_token")
_ALWAYS: dict[str, int] = {
    r".*vocab_size": VOCABULARY,
    r"(.*_)?(max_position_embeddings|n_positions|n_ctx|max_seq_len|max_target_positions)": POSITIONS,
    r"(.*_)?max_sequence_length": POSITIONS,
    r"max_source_positions": 32,
    r"num_queries|num_query_tokens|.*num_latents|.*n_latents|two_stage_num_proposals|num_denoising": 8,
    r".*num_experts_per_tok|moe_topk|moe_k|top_k_experts": 2,
    r"codebook_size|num_embeddings|.*hash_byte_group_vocab|num_hash_buckets|num_codevectors_per_group": 64,
    r"n_group|topk_group|.*n_shared_experts|first_k_dense_replace": 1,
}
_WIDTHS: dict[str, int] = {
    r".*intermediate_size": 96,
    r".*(ffn_dim|d_ff|mlp_dim|ffn_hidden_size|dim_feedforward|feedforward_dim)": 96,
    r".*(dff|dim_ff|n_inner|d_inner|intermediate_dim)": 96,
    r".*(num_key_value_heads|n_kv_heads|num_kv_heads)": 2,
    r".*(attention_heads|num_heads|n_head|n_heads|_heads)": HEADS,
    r"(.*_)?(head_dim|d_kv|d_head|dim_head|key_value_channels)": HEAD_DIM,
    r"q_lora_rank|kv_lora_rank|o_lora_rank": 32,
    r"(.*_)?(hidden_size|hidden_dim|d_model|n_embd|embed_dim|emb_dim|dim|embedding_size|embedding_dim|project_dim"
    r"|projection_dim|projection_size|feature_size|pooler_output_size|classifier_proj_size|output_dim"
    r"|conv_dim)": HIDDEN,
    r".*num_(local_)?experts|n_routed_experts|moe_num_experts|num_routed_experts": 4,
}
_SAME, _RATE_LATER = object(), object()


class Shrink:
    """How far to shrink.

    Args:
        widths: the channel sizes too.
        image: the image size; None leaves it.
        layers: how many are left; a model that mixes kinds of layers needs more than two.
    """

    def __init__(self, widths: bool, image: int | None, layers: int = LAYERS) -> None:
        self.widths, self.image, self.layers = widths, image, layers
        self.tokens: dict[str, int] = {}

    def config(self, cls: type, extra: dict[str, Any] | None = None) -> Any:
        """A tiny configuration of class `cls`; `extra` wins over the rules, in nested parts too."""
        return self._made(cls, cls(), extra or {})

    def _made(self, cls: type, default: Any, extra: dict[str, Any]) -> Any:
        usual = cls()
        chosen: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            if not field.init:
                continue
            try:
                value = getattr(default, field.name)
            except Exception:  # an attribute that differs from layer to layer
                continue
            small = self._value(field, value, default, extra)
            if small is not _SAME:
                chosen[field.name] = small
            elif value != getattr(usual, field.name, None):
                chosen[field.name] = value  # what the whole says of its part
        config = cls(**{name: value for name, value in chosen.items() if value is not _RATE_LATER})
        for name in [name for name, value in chosen.items() if value is _RATE_LATER]:
            vars(config)[name] = RATE  # the field is typed as an int, though its 0 is a rate
        wanted = getattr(default, "_out_indices", None)  # no field, but a part of what a backbone is
        if wanted and max(wanted) < len(getattr(config, "stage_names", ())):
            config.out_indices = list(wanted)
        return config

    def _value(self, field: Any, value: Any, default: Any, extra: dict[str, Any]) -> Any:
        part = hasattr(value, "to_dict") and dataclasses.is_dataclass(value)
        if field.name in extra:
            given = extra[field.name]
            return self._made(type(value), value, given) if part and isinstance(given, dict) else given
        if part:
            return self._made(type(value), value, {})
        small = self._field(field.name, value, default)
        return _RATE_LATER if small == RATE and field.type in ("int", "int | None", int) else small

    def _field(self, name: str, value: Any, default: Any) -> Any:
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
            return self._integer(name, value, default)
        if isinstance(value, (list, tuple)) and value:
            return self._list(name, value, default)
        if isinstance(value, dict) and "rope_theta" in value and self.widths:
            return value | {"mrope_section": MROPE}
        return "resnet18" if name == "backbone" and value == "resnet50" else _SAME

    def _integer(self, name: str, value: int, default: Any) -> Any:
        if value <= 0 or (name in ("num_layers", "num_stages") and any(_lists_of(default, value))):
            return _SAME
        if name == "image_size" and self.image:
            return self.image
        if _LAYERS.fullmatch(name):
            return min(self.layers, value)
        if _TOKEN.fullmatch(name) and value >= VOCABULARY:
            return self.tokens.setdefault(name, VOCABULARY - 1 - len(self.tokens))
        heads = type(default).attribute_map.get("num_attention_heads", "num_attention_heads")
        if self.widths and name.endswith("num_key_value_heads") and value == vars(default).get(heads):
            return HEADS
        rules = _ALWAYS | (_WIDTHS if self.widths else {})
        small = next((size for pattern, size in rules.items() if re.fullmatch(pattern, name)), None)
        return _SAME if small is None else min(small, value)

    def _list(self, name: str, value: Any, default: Any) -> Any:
        if _DEPTHS.fullmatch(name) and all(isinstance(one, int) for one in value):
            return type(value)(1 for _ in value)
        if name == "image_size" and self.image:
            return type(value)(self.image for _ in value)
        layers = vars(default).get("num_hidden_layers")
        listed = isinstance(layers, int) and len(value) == layers > self.layers
        return type(value)(value[: self.layers]) if listed and _PER_LAYER.search(name) else _SAME


def _lists_of(config: Any, length: int) -> Iterator[bool]:
    """Does the configuration list something for each of `length` stages?"""
    for field in dataclasses.fields(config):
        value = vars(config).get(field.name)
        yield isinstance(value, (list, tuple)) and len(value) == length
