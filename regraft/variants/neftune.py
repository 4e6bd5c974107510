"""NEFTune: uniform noise on embeddings."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from torch import Tensor, nn

from regraft.variants.checks import check_number
from regraft.variants.draws import uniform_like
from regraft.variants.module import ThinModule
from regraft.variants.spec import Spec


def neftune(x: Tensor, p: float = 0.0, training: bool = True, *, alpha: float = 5.0) -> Tensor:
    """Noise added to embeddings: uniform on +-alpha / sqrt(T * C), for T tokens of C features.

    Options:
        alpha: how much noise; the paper uses 5, 10 and 15.

    Shape:
        (..., T, C); the output's is the input's.

    Source:
        Jain et al. (2024), "NEFTune: noisy embeddings improve instruction finetuning".

    Differs:
        T is the padded length of the batch (as in the released code); the paper's is each sequence's.

    Example:
        >>> import torch
        >>> x = torch.zeros(2, 5, 20)
        >>> bool((neftune(x).abs() <= 0.5).all())
        True
    """
    if not training or alpha == 0:
        return x
    bound = alpha / max(math.prod(x.shape[-2:]), 1) ** 0.5
    return x + uniform_like(x).mul_(2 * bound).sub_(bound).to(x.dtype)


@Spec(
    "neftune",
    neftune,
    ("Embedding",),
    {"alpha": partial(check_number, least=0)},
    needs_rate=lambda _: False,
    rated=False,
)
class NEFTuneEmbedding(ThinModule, nn.Embedding):
    """`nn.Embedding` with `neftune` noise in training: `NEFTuneEmbedding(10, 4, alpha=5.0)`."""

    family = "Embedding"

    def __init__(
        self, num_embeddings: int, embedding_dim: int, *args: Any, alpha: float = 5.0, **kwargs: Any
    ) -> None:
        self.spec.check({"alpha": alpha})
        super().__init__(num_embeddings, embedding_dim, *args, **kwargs)
        self.alpha = alpha

    def forward(self, input: Tensor) -> Tensor:
        return neftune(super().forward(input), training=self.training, alpha=self.alpha)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, alpha={self.alpha!r}"
