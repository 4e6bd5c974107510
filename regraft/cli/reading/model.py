"""What a file holds, once read."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from regraft.cli.reading.tree import ReadModule, walk

NOT_RUN = "read from the file, not run"


@dataclass(eq=False)
class ReadModel:
    """A model as its file describes it.

    Attributes:
        path: the file or folder.
        form: "module", "weights", "script" (TorchScript) or "program" (torch.export).
        root: the tree of modules; of weights alone, what they must belong to.
        notes: what a reader should know first.
        key: where in a checkpoint dictionary it stands, "" if it is the whole file.
        shapes: of weights alone, all of them.
    """

    path: Path
    form: str
    root: ReadModule
    notes: list[str] = field(default_factory=list)
    key: str = ""
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    modules: list[ReadModule] = field(init=False)

    def __post_init__(self) -> None:
        while (inside := _WRAPPERS.get(self.root.type)) and inside in self.root.children:
            self.notes.append(f"looked inside {self.root.type}: paths begin at the model it wraps")
            self.root = self.root.children[inside]
        self.modules = walk(self.root)


_WRAPPERS = {
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "OptimizedModule": "_orig_mod",
}
