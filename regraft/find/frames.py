"""Source lines: which line of the user's model, or of its library, is running."""

from __future__ import annotations

import os
import sys
from types import FrameType

import torch

_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep  # with the separator: not torchvision
_OWN = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


def calling_frames() -> list[FrameType]:
    """The frames above this one that are neither torch's nor regraft's, up to the next module's call."""
    frames: list[FrameType] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if frames and frame.f_code.co_name == "_call_impl" and name.startswith(_TORCH):
            break
        if not name.startswith((_TORCH, _OWN)):
            frames.append(frame)
        frame = frame.f_back
    return frames


def caller_line() -> str:
    """`bert/modeling_bert.py:198`: the nearest line that is neither torch's nor regraft's."""
    return line_of(calling_frames())


def line_of(frames: list[FrameType]) -> str:
    """The line of the innermost frame; "" where there is none."""
    if not frames:
        return ""
    return f"{short(frames[0].f_code.co_filename)}:{frames[0].f_lineno}"


def short(filename: str) -> str:
    """The last two parts of a file's path."""
    return "/".join(filename.replace(os.sep, "/").split("/")[-2:])
