"""PEFT's layers in tiny Hugging Face models."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from .entry import RATE, Entry, Inputs

_LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": RATE}


def entries() -> Iterator[Entry]:
    """Each kind of layer on the models it is most used with."""
    for name, (base, configured) in _WAYS.items():
        yield Entry("peft", name, functools.partial(_make, base, configured))


def _make(base: str, configured: Callable[[], Any]) -> tuple[nn.Module, Inputs]:
    from peft import get_peft_model

    model = get_peft_model(_BASES[base](), configured())
    for parameter in model.parameters():
        if parameter.requires_grad:  # LoRA's B starts at zero, where its dropout would change nothing
            parameter.data.normal_(std=0.02)
    ids = torch.arange(5, 29).view(2, 12)
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return BertForSequenceClassification(BertConfig(vocab_size=99, **sizes))


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return LlamaForCausalLM(LlamaConfig(vocab_size=99, attention_dropout=RATE, use_cache=False, **sizes))


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=2, n_positions=64, use_cache=False)
    )


def _t5() -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(vocab_size=99, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2))


_BASES: dict[str, Callable[[], nn.Module]] = {"bert": _bert, "llama": _llama, "gpt2": _gpt2, "t5": _t5}


def _config(name: str, **options: Any) -> Callable[[], Any]:
    def made() -> Any:
        import peft

        return getattr(peft, name)(**options)

    return made


_WAYS: dict[str, tuple[str, Callable[[], Any]]] = {
    "lora-bert": (
        "bert",
        _config("LoraConfig", **_LORA, target_modules=["query", "value"], task_type="SEQ_CLS"),
    ),
    "lora-llama": (
        "llama",
        _config("LoraConfig", **_LORA, target_modules="all-linear", task_type="CAUSAL_LM"),
    ),
    "lora-gpt2": ("gpt2", _config("LoraConfig", **_LORA, target_modules=["c_attn"], fan_in_fan_out=True)),
    "lora-t5": ("t5", _config("LoraConfig", **_LORA, target_modules=["q", "v"])),
    "dora-llama": (
        "llama",
        _config("LoraConfig", **_LORA, use_dora=True, target_modules=["q_proj", "v_proj"]),
    ),
    "lora-embedding": ("bert", _config("LoraConfig", **_LORA, target_modules=["word_embeddings", "dense"])),
    "ia3-bert": (
        "bert",
        _config(
            "IA3Config", target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"]
        ),
    ),
    "adalora-llama": (
        "llama",
        _config(
            "AdaLoraConfig", init_r=4, target_r=2, total_step=10, lora_dropout=RATE, target_modules=["q_proj"]
        ),
    ),
    "vera-bert": ("bert", _config("VeraConfig", r=4, vera_dropout=RATE, target_modules=["query", "value"])),
    "loha-bert": (
        "bert",
        _config("LoHaConfig", r=4, alpha=4, rank_dropout=RATE, target_modules=["query", "value"]),
    ),
    "oft-llama": (
        "llama",
        _config("OFTConfig", oft_block_size=8, module_dropout=RATE, target_modules=["q_proj"]),
    ),
    "prefix-gpt2": ("gpt2", _config("PrefixTuningConfig", num_virtual_tokens=4, task_type="CAUSAL_LM")),
    "prompt-llama": ("llama", _config("PromptTuningConfig", num_virtual_tokens=4, task_type="CAUSAL_LM")),
}
