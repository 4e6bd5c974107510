"""The classes of what regraft's functions return and pass on, for annotations and `isinstance`.

Example:
    >>> import regraft
    >>> from torch import nn
    >>> isinstance(regraft.inspect(nn.Dropout(0.1)), regraft.results.Inspection)
    True
"""

from __future__ import annotations

from regraft.find.diff import Difference
from regraft.find.inspect import Inspection
from regraft.find.site import Site
from regraft.graft.apply import Report
from regraft.graft.verify import Verification
from regraft.training.max_norm import MaxNorm
from regraft.training.mc import MCPrediction
from regraft.training.rdrop.state import RDropOutput
from regraft.training.schedule import Schedule
from regraft.training.suggest import Advice
from regraft.variants.spec import Variant

__all__ = [
    "Advice",
    "Difference",
    "Inspection",
    "MCPrediction",
    "MaxNorm",
    "RDropOutput",
    "Report",
    "Schedule",
    "Site",
    "Variant",
    "Verification",
]
