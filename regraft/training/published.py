"""Published settings, each with its source: what `regraft.suggest` stands on."""

from __future__ import annotations

from dataclasses import dataclass

SRIVASTAVA = "Srivastava et al. 2014, Dropout"
LIANG = "Liang et al. 2021, R-Drop"
LIU = "Liu et al. 2023, Dropout Reduces Underfitting"
DEIT3 = "Touvron et al. 2022, DeiT III, ImageNet-1k recipe"
CONVNEXT = "Liu et al. 2022, ConvNeXt, ImageNet-1k recipe"
SWIN = "Liu et al. 2021, Swin Transformer, ImageNet-1k recipe"
DEVLIN = "Devlin et al. 2019, BERT"
LEE = "Lee et al. 2020, Mixout"
JAIN = "Jain et al. 2024, NEFTune"
GHIASI = "Ghiasi et al. 2018, DropBlock"
WANG = "Wang et al. 2024, LoRA Meets Dropout"
MERITY = "Merity et al. 2018, AWD-LSTM"
RESULTS = "docs/results.md: 50 and 200 labelled film reviews, 8 seeds each"

FEW_LABELS = 200
"""Up to here `RESULTS` is a guide: what helped with 50 and with 200 labels did not help with 1,000."""
SMALL = 5.0
"""Trainable parameters per example. Dropout hurt ViT-T on ImageNet-1k (4.5) and helped ViT-B (68)."""
LOST_BY_IT = (
    "on ImageNet-1k, ViT-T (4.5 parameters per image) fell from 73.9 % to 67.9 % with dropout and to 72.6 % "
    "with stochastic depth, and rose to 74.3 % where dropout ended after a sixth of the training"
)


@dataclass(frozen=True)
class Alpha:
    """A weight of R-Drop's KL and the task that it was published for."""

    alpha: float
    task: str


ALPHAS = {
    "text encoder": Alpha(1.0, "GLUE, where it is chosen among 0.1, 0.5 and 1.0"),
    "sequence-to-sequence model": Alpha(5.0, "translation; 0.7 for summarization with BART"),
    "causal language model": Alpha(1.0, "language modelling on WikiText-103"),
    "vision transformer": Alpha(0.6, "ViT on CIFAR-100 and ImageNet"),
}
"""By kind of model."""

DROP_PATHS: dict[str, tuple[str, tuple[tuple[float, float], ...]]] = {
    "ConvNeXt": (CONVNEXT, ((28.6, 0.1), (50.2, 0.4), (88.6, 0.5), (197.8, 0.5))),
    "Swin": (SWIN, ((28.3, 0.2), (49.6, 0.3), (87.8, 0.5))),
    "": (DEIT3, ((22.0, 0.05), (86.6, 0.2), (304.4, 0.45), (632.1, 0.6))),
}
"""By prefix of the class name: the source; millions of parameters, and the rate."""


def drop_path_rate(name: str, parameters: int) -> tuple[float, str]:
    """The drop-path rate of the published model that is nearest in size, and its source."""
    source, sizes = next(known for prefix, known in DROP_PATHS.items() if name.startswith(prefix))
    millions = parameters / 1e6
    # Nearest by ratio, since sizes differ by factors.
    rate = min(sizes, key=lambda size: max(size[0] / millions, millions / size[0]))[1]
    return rate, source
