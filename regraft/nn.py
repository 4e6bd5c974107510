"""The regularizers as plain modules, each usable without any graft.

Example:
    >>> from regraft import nn
    >>> nn.GaussianDropout(0.1)
    GaussianDropout(p=0.1)
"""

from __future__ import annotations

from regraft.variants.dropconnect import DropConnectLinear
from regraft.variants.dropout import Dropout
from regraft.variants.gaussian import GaussianDropout
from regraft.variants.multisample import MultiSampleDropout
from regraft.variants.off import Off
from regraft.variants.standout import StandoutDropout, StandoutLinear

__all__ = [
    "DropConnectLinear",
    "Dropout",
    "GaussianDropout",
    "MultiSampleDropout",
    "Off",
    "StandoutDropout",
    "StandoutLinear",
]
