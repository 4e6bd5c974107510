"""The regularizers as plain modules, each usable without any graft.

Example:
    >>> from regraft import nn
    >>> nn.GaussianDropout(0.1)
    GaussianDropout(p=0.1)
"""

from __future__ import annotations

from regraft.variants.alpha import AlphaDropout
from regraft.variants.concrete import ConcreteDropout
from regraft.variants.consistent import ConsistentDropout
from regraft.variants.dropblock import DropBlock
from regraft.variants.dropconnect import DropConnectLinear
from regraft.variants.drophead import DropHead
from regraft.variants.dropkey import DropKey
from regraft.variants.dropout import Dropout
from regraft.variants.droppath import DropPath
from regraft.variants.elementwise import ElementwiseDropout
from regraft.variants.gaussian import GaussianDropout
from regraft.variants.mc import MCDropout
from regraft.variants.mixout import MixoutLinear
from regraft.variants.multisample import MultiSampleDropout
from regraft.variants.neftune import NEFTuneEmbedding
from regraft.variants.noise import GaussianNoise
from regraft.variants.off import Off
from regraft.variants.shaped import ShapedDropout
from regraft.variants.spatial import SpatialDropout
from regraft.variants.standout import StandoutDropout, StandoutLinear
from regraft.variants.token import TokenDropout
from regraft.variants.uniform import UniformDropout
from regraft.variants.weightdrop import WeightDropLinear

__all__ = [
    "AlphaDropout",
    "ConcreteDropout",
    "ConsistentDropout",
    "DropBlock",
    "DropConnectLinear",
    "DropHead",
    "DropKey",
    "DropPath",
    "Dropout",
    "ElementwiseDropout",
    "GaussianDropout",
    "GaussianNoise",
    "MCDropout",
    "MixoutLinear",
    "MultiSampleDropout",
    "NEFTuneEmbedding",
    "Off",
    "ShapedDropout",
    "SpatialDropout",
    "StandoutDropout",
    "StandoutLinear",
    "TokenDropout",
    "UniformDropout",
    "WeightDropLinear",
]
