"""Source lines: which line of the user's model, or of its library, is running."""

from __future__ import annotations

import os
import re
import sys
import traceback
from types import FrameType

import torch

_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep  # with the separator: not torchvision
_OWN = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep

_PYTHON = os.path.dirname(os.__file__) + os.sep
_VARIANTS = os.path.join(_OWN, "variants") + os.sep
_GRAFT = os.path.join(_OWN, "graft") + os.sep
_LAYERS = os.path.join(_TORCH, "nn", "modules")
_OBSERVER = os.path.join(_OWN, "find", "probe", "ledger.py")
_GENERATED = "<eval_with_key>"
_TRACED = re.compile(r'File "([^"]+)", line (\d+)')


def calling_frames() -> list[FrameType]:
    """The frames above this one that are neither torch's nor regraft's, up to the next module's call.

    In a model of torch's own layers alone, such as `nn.TransformerEncoder`, the frame of the layer.
    """
    frames: list[FrameType] = []
    layers: list[FrameType] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name == _OBSERVER and frame.f_code.co_name == "observe":
            break  # what is above looks at the model
        if frames and frame.f_code.co_name == "_call_impl" and name.startswith(_TORCH):
            break
        if not name.startswith((_TORCH, _OWN)):
            frames.append(frame)
        elif _is_layer(name) and not layers:
            layers.append(frame)
        frame = frame.f_back
    return frames or layers


def is_users(frame: FrameType) -> bool:
    """Whether a frame is of the model or its library: of neither torch, regraft, Python nor numpy."""
    name, numpy = frame.f_code.co_filename, sys.modules.get("numpy")
    if name.startswith(_PYTHON) and "-packages" not in name:
        return False
    others = [] if numpy is None else [os.path.dirname(str(numpy.__file__)) + os.sep]
    return not name.startswith((_TORCH, _OWN, "<", *others))


def in_a_variant() -> bool:
    """Whether a variant, or the graft around a call, runs below the nearest line of anybody else's."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(_VARIANTS):
            return True
        if name.startswith(_GRAFT) and frame.f_locals.get("graft") is not None:
            return True
        if not name.startswith((_TORCH, _OWN)):
            return False
        frame = frame.f_back
    return False


def _is_layer(name: str) -> bool:
    folder, _, file = name.rpartition(os.sep)
    return folder == _LAYERS and file not in ("module.py", "container.py", "dropout.py")


def caller_line() -> str:
    """`bert/modeling_bert.py:198`: the nearest line that is neither torch's nor regraft's."""
    return line_of(calling_frames())


def line_of(frames: list[FrameType]) -> str:
    """The line of the innermost frame; "" where there is none, or where torch.fx generated it."""
    if not frames or frames[0].f_code.co_filename.startswith(_GENERATED):
        return ""
    return f"{short(frames[0].f_code.co_filename)}:{frames[0].f_lineno}"


def line_of_trace(trace: str | None) -> str | None:
    """The line of a written stack trace that made a graph node; None where none was kept."""
    for file, number in reversed(_TRACED.findall(trace or "")):
        if not file.startswith((_TORCH, _OWN, _GENERATED)):
            return f"{short(file)}:{number}"
    return None


def own_line(stack: traceback.StackSummary) -> str:
    """Of the frames of an error, the line of the innermost that is neither torch's nor regraft's."""
    for frame in reversed(stack):
        if not frame.filename.startswith((_TORCH, _OWN)):
            return f"{short(frame.filename)}:{frame.lineno}"
    return ""


def short(filename: str) -> str:
    """The last two parts of a file's path."""
    return "/".join(filename.replace(os.sep, "/").split("/")[-2:])
