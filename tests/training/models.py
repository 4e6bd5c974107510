"""Small real models, without weights from anywhere."""

import torch
from torch import nn


def bert(**options):
    from transformers import BertConfig, BertForSequenceClassification

    settings = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "vocab_size": 99,
        **options,
    }
    return BertForSequenceClassification(BertConfig(**settings))


def headed_bert(p=0.3):
    """A BERT that drops in its head alone."""
    model = bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model.dropout.p = p
    return model


def tokens(batch=4, length=8):
    return torch.randint(5, 99, (batch, length), generator=torch.Generator().manual_seed(0))


def vit(**rates):
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5, **rates
    )


def images(batch=4, size=32):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


class DropPath(nn.Module):
    """As timm and its many copies draw it: in place, on memory made for it."""

    def forward(self, x):
        if not self.training:
            return x
        mask = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(0.5)
        return x * mask.div_(0.5)


class FusedAttention(nn.Module):
    def forward(self, x):
        p = 0.5 if self.training else 0.0
        return nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=p)
