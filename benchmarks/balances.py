"""The balance of well-known models: what becomes of each draw and each matrix that multiplies.

    python benchmarks/balances.py

Dropouts get `gaussian` and drop-paths `droppath`, then matrices `dropconnect`. The models have random weights
and are those that the tables of docs/reach.md name; nothing is computed, but for Mixtral's and the LSTM's.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import regraft

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "find"))
RULES = {"Dropout": "gaussian(p=0.1)", "DropPath": "droppath(p=0.1)"}


def models() -> Iterator[tuple[str, Callable[[], nn.Module], Any]]:
    """Name, what builds it, and inputs where regraft does not make them."""
    import timm
    import torchvision
    from programs import PROGRAMS
    from transformers import BertConfig, BertModel, MixtralConfig, MixtralForCausalLM

    mixtral = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        attention_dropout=0.1,
        router_jitter_noise=0.02,
    )
    yield "BERT-base", lambda: BertModel(BertConfig()), None
    yield "ConvNeXt-T", lambda: timm.create_model("convnext_tiny", drop_rate=0.1, drop_path_rate=0.1), None
    yield "Swin-T (torchvision)", lambda: torchvision.models.swin_t(weights=None, dropout=0.1), None
    yield "Mixtral, 2 layers", lambda: MixtralForCausalLM(mixtral), None
    for name in ("AWD-LSTM", "the article"):
        build, inputs, *_ = PROGRAMS[name]
        yield name, build, inputs()


def main() -> None:
    """Print a row of a table for each model."""
    warnings.simplefilter("ignore")
    print("| model | draws | matrices |\n|---|---|---|")
    for name, build, inputs in models():
        torch.manual_seed(0)
        model = build()
        noise = [rule for rule in RULES.items() if _matches(model, rule, inputs)]
        seen = regraft.plan(model, noise, inputs) if noise else regraft.inspect(model, inputs)
        draws = _line(seen, "draws seen")
        print(f"| {name} | {draws} | {_line(_matrices(model, inputs), 'multipl')} |", flush=True)


def _matrices(model: nn.Module, inputs: Any) -> Any:
    return regraft.plan(model, {"Linear": "dropconnect(p=0.1)"}, inputs)


def _matches(model: nn.Module, rule: tuple[str, str], inputs: Any) -> bool:
    try:
        return bool(regraft.plan(model, [rule], inputs).grafted)
    except regraft.errors.NoMatchError:
        return False


def _line(report: Any, word: str) -> str:
    text = str(report)
    line = next((line for line in text.splitlines() if word in line), str(report.balance))
    return line.strip().removeprefix("balance: ").removeprefix("- ")


if __name__ == "__main__":
    main()
