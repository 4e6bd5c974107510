"""Traits of a model that is to be regularized: its kind, its size against its data, the rates it has."""

from __future__ import annotations

from typing import Any

from torch import nn

from regraft.find.inspect import Inspection
from regraft.record import original_class
from regraft.training.advice.published import SMALL


class Traits:
    """What is known of a model: its kind, its size against its data, and the rates it has."""

    def __init__(self, inspection: Inspection, examples: int) -> None:
        self.inspection, self.root = inspection, inspection.root
        self.modules = [(named.paths[0], named.module) for named in inspection.modules]
        self.names = {original_class(module).__name__ for _, module in self.modules}
        self.config: Any = getattr(self.root, "config", None)
        self.parameters = sum(p.numel() for p in self.root.parameters() if p.requires_grad)
        self.every = sum(p.numel() for p in self.root.parameters())
        self.examples = examples
        self.small = self.parameters < SMALL * examples
        noise = [
            site for site in inspection.sites if site.family in ("Dropout", "DropPath") and site.calls != 0
        ]
        self.noise = noise
        self.rates = sorted({site.p for site in noise if site.p})
        self.kind = self._kind()

    def of_type(self, *types: type[nn.Module]) -> list[str]:
        return [path for path, module in self.modules if isinstance(module, types)]

    def _kind(self) -> str:
        attends = any("Attention" in name for name in self.names)
        if self.of_type(nn.LSTM, nn.GRU, nn.RNN) and not attends:
            return "recurrent network"
        if getattr(self.config, "vocab_size", None) or (attends and self.of_type(nn.Embedding)):
            if getattr(self.config, "is_encoder_decoder", False):
                return "sequence-to-sequence model"
            decodes = type(self.root).__name__.endswith(("ForCausalLM", "LMHeadModel"))
            return "causal language model" if decodes else "text encoder"
        if self.of_type(nn.Conv2d):
            convolves = len(self.of_type(nn.Conv2d)) > len(self.of_type(nn.Linear))
            return "convolutional network" if convolves or not attends else "vision transformer"
        return "text encoder" if attends else "feed-forward network"
