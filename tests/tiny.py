"""Small models of every kind that the tests graft, each built in milliseconds."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Calls(nn.Module):
    """Functional dropout in its own forward, and a child that has one too."""

    def __init__(self, child: nn.Module | None = None, p: float = 0.5) -> None:
        super().__init__()
        self.p = p
        self.child = nn.Identity() if child is None else child

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.child(x), self.p, self.training)


class Attention(nn.Module):
    """Fused attention with a rate, as most libraries call it."""

    def __init__(self, width: int = 16, heads: int = 2, p: float = 0.3) -> None:
        super().__init__()
        self.heads, self.p = heads, p
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (one.unflatten(-1, (self.heads, -1)).transpose(1, 2) for one in self.qkv(x).chunk(3, -1))
        rate = self.p if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=rate)
        return self.out(y.transpose(1, 2).flatten(2))


def mlp(p: float = 0.1) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(p), nn.Linear(8, 3))


def bert(*, layers: int = 2, attention: str = "sdpa", p: float = 0.1) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        **_text(layers), hidden_dropout_prob=p, attention_probs_dropout_prob=p, attn_implementation=attention
    )
    return BertForSequenceClassification(config)


def albert() -> nn.Module:
    """One layer shared by all depths."""
    from transformers import AlbertConfig, AlbertForSequenceClassification

    config = AlbertConfig(
        **_text(3), embedding_size=16, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1
    )
    return AlbertForSequenceClassification(config)


def bart() -> nn.Module:
    """Rates are floats on the modules, calls are functional."""
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(
        vocab_size=60,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=32,
        dropout=0.1,
        attention_dropout=0.2,
        activation_dropout=0.3,
    )
    return BartForConditionalGeneration(config)


def llama(p: float = 0.1) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=60,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        attention_dropout=p,
    )
    return LlamaForCausalLM(config)


def _text(layers: int) -> dict[str, object]:
    return {
        "vocab_size": 60,
        "hidden_size": 16,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 32,
    }


def tokens(batch: int = 2, length: int = 8) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "input_ids": torch.randint(3, 60, (batch, length), generator=generator),
        "attention_mask": torch.ones(batch, length, dtype=torch.long),
    }


def vit(p: float = 0.1) -> nn.Module:
    import timm

    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        depth=2,
        embed_dim=24,
        num_heads=2,
        num_classes=5,
        drop_rate=p,
        attn_drop_rate=p,
        proj_drop_rate=p,
    )


def images(batch: int = 2, size: int = 32) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def densenet() -> nn.Module:
    """`F.dropout` inside every dense layer."""
    from torchvision.models import DenseNet

    return DenseNet(growth_rate=4, block_config=(2, 2), num_init_features=8, bn_size=2, drop_rate=0.2)


def encoder(p: float = 0.1) -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, p, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


def logits(output: object) -> Tensor:
    """The tensor of a model's output."""
    return output if isinstance(output, Tensor) else output[0]
