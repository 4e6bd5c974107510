"""Source lines: which line of the user's model, or of its library, is running."""

from __future__ import annotations

import os
import sys

import torch

_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep  # with the separator: not torchvision
_OWN = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


def caller_line() -> str:
    """`bert/modeling_bert.py:198`: the nearest frame that is neither torch's nor regraft's."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith((_TORCH, _OWN)):
            return f"{short(name)}:{frame.f_lineno}"
        if frame.f_back is None:
            break
        frame = frame.f_back
    return ""


def short(filename: str) -> str:
    """The last two parts of a file's path."""
    return "/".join(filename.replace(os.sep, "/").split("/")[-2:])
