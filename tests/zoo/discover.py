"""Writes `hf_names.txt`: which Hugging Face architectures build and run tiny, and how.

    python -m tests.zoo.discover            # all of them, about half an hour
    python -m tests.zoo.discover bert bart  # these, merged into the list; says why one fails

Run it when transformers has new architectures. The list makes the tests fast and the same every time.
"""

from __future__ import annotations

import re
import signal
import sys
import traceback
from collections.abc import Iterator
from typing import Any

import torch

from . import hf_inputs
from .check import quiet
from .entry import forward, tensors
from .hf_configs import Shrink
from .models_hf import NAMES, make

LEVELS = ("tiny 32 2", "tiny 64 2", "tiny 32 4", "wide 64 2", "wide 224 2", "wide 0 2")
"""Widths, image size (0: as it is) and layers; the first that runs is taken."""
CAP = 3e7
_MAPPING = re.compile(r"MODEL_FOR_\w+_MAPPING_NAMES")
HEADS = (
    "SEQUENCE_CLASSIFICATION",
    "IMAGE_CLASSIFICATION",
    "AUDIO_CLASSIFICATION",
    "SPEECH_SEQ_2_SEQ",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "CAUSAL_LM",
    "MASKED_LM",
    "CTC",
    "VIDEO_CLASSIFICATION",
    "SEMANTIC_SEGMENTATION",
    "OBJECT_DETECTION",
    "DEPTH_ESTIMATION",
    "IMAGE_TEXT_TO_TEXT",
    "MULTIMODAL_LM",
    "PRETRAINING",
)
"""The heads tried first, in this order: those with dropout of their own."""
SECONDS = 20


def main() -> None:
    quiet()
    lines = NAMES.read_text().splitlines() if NAMES.exists() else []
    known = {line.partition("\t")[0]: line for line in lines}
    for model_type in sys.argv[1:] or sorted(_types()):
        errors: list[str] = []
        found = next(_attempts(model_type, errors), None)
        if found is not None:
            known[model_type] = found
        print(found or f"{model_type}: {errors[0] if errors else 'no class'}", flush=True)
        NAMES.write_text("".join(f"{known[name]}\n" for name in sorted(known)))


def _types() -> set[str]:
    from transformers.models.auto import modeling_auto

    return set(modeling_auto.MODEL_MAPPING_NAMES) | set(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def classes(model_type: str) -> list[str]:
    """The classes of a model type worth trying, those with a head first."""
    from transformers.models.auto import modeling_auto

    mappings = [f"MODEL_FOR_{head}_MAPPING_NAMES" for head in HEADS]
    mappings += ["MODEL_MAPPING_NAMES", *(name for name in vars(modeling_auto) if _MAPPING.fullmatch(name))]
    found = [getattr(modeling_auto, name, {}).get(model_type) for name in mappings]
    flat = [one for item in found if item for one in ([item] if isinstance(item, str) else item)]
    return list(dict.fromkeys(flat))


def _attempts(model_type: str, errors: list[str]) -> Iterator[str]:
    signal.signal(signal.SIGALRM, _too_slow)
    for class_name in classes(model_type):
        for level in LEVELS:
            widths, image, layers = level.split()
            for way in hf_inputs.WAYS:
                signal.alarm(SECONDS)
                try:
                    torch.manual_seed(0)
                    shrink = Shrink(widths == "tiny", int(image) or None, int(layers))
                    _run(*make(model_type, class_name, shrink, way, cap=CAP))
                    yield "\t".join((model_type, class_name, widths, image, layers, way))
                except Exception as error:
                    what = f"{type(error).__name__}: {error} ({_place(error)})"
                    errors.append(f"{class_name} {level} {way}: {what}")
                finally:
                    signal.alarm(0)


def _run(model: torch.nn.Module, inputs: Any) -> None:
    forward(model.train(), inputs)
    with torch.no_grad():
        if not tensors(forward(model.eval(), inputs)):
            raise RuntimeError("the output holds no tensor")


def _too_slow(*_: object) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    last = next((frame for frame in reversed(frames) if "/models/" in frame.filename), frames[-1])
    return f"{last.filename.rpartition('/')[2]}:{last.lineno}"


if __name__ == "__main__":
    main()
