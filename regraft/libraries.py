"""Classes of libraries that may not be there: known by identity, never by a name, and without an import."""

from __future__ import annotations

import sys
from typing import Any


def library_class(module: str, name: str) -> type | None:
    """The class `name` of an imported module; None where the module has not been imported.

    What was never imported has no instances either.
    """
    found = getattr(sys.modules.get(module), name, None)
    return found if isinstance(found, type) else None


def is_of(value: Any, module: str, name: str) -> bool:
    """Whether `value`, an object or a class, is of the class `name` of `module`, or of a derived one."""
    wanted = library_class(module, name)
    return wanted is not None and issubclass(value if isinstance(value, type) else type(value), wanted)


def is_conv1d(value: Any) -> bool:
    """GPT-2's linear layer in Transformers, whose weight is stored as (in, out)."""
    return is_of(value, "transformers.pytorch_utils", "Conv1D")


def is_fsdp(module: Any) -> bool:
    """A module that `fully_shard` has been applied to."""
    return is_of(module, "torch.distributed.fsdp", "FSDPModule")


def is_sharded(tensor: Any) -> bool:
    """A DTensor, which holds a part of its values."""
    return is_of(tensor, "torch.distributed.tensor", "DTensor")
