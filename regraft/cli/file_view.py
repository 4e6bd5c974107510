"""How a file that was read is shown: its sites, the verdicts on its names, and what follows from them.

The sites are those of `regraft.find.modules`, seen by name, since that asks real classes and so needs torch;
a test holds the two to the same answers.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from regraft.errors import FileError
from regraft.files.detect import FileReport, read, read_folder, sha256
from regraft.files.skeleton import FileModel, FileModule
from regraft.files.verdicts import RefusedError, Verdicts
from regraft.report.document import answer_of, counted, visible
from regraft.report.view import SCHEMA, View

PLAN = "regraft.json"

_TORCH = str.split(
    "Dropout Dropout1d Dropout2d Dropout3d AlphaDropout FeatureAlphaDropout Linear Embedding "
    "MultiheadAttention LSTM GRU RNN"
)
_LINEAR_OF_ATTENTION = "NonDynamicallyQuantizableLinear"
_DROP_PATH = re.compile(r"(DropPath|StochasticDepth)$")
_PRIVATE_DROPOUT = re.compile(r"Dropout(\dd)?$")
_OTHER_NOISE = re.compile(r"Patch|Token|Word|Feature|Channel|Spatial|Block|Variational|Locked|\dd$")
_RATES = ("p", "drop_prob", "drop_rate", "dropout", "dropout_rate", "prob")
_SHAPES = {
    "Linear": ("in_features", "out_features"),
    "Embedding": ("num_embeddings", "embedding_dim"),
    "Conv1D": ("nx", "nf"),
}


def sites_of(model: FileModel) -> list[dict[str, Any]]:
    """The sites, as an inspection lists them."""
    sites = []
    for module in model.modules:
        op = op_of(module)
        if op is not None:
            sites.append(_site(module, op))
        for edit in module.grafts:
            if edit["kind"] != "module" and edit["op"] != op:
                sites.append(_grafted_call(module, edit))
    return sites


def op_of(module: FileModule) -> str | None:
    """The operation that makes a module a site, None if it is none."""
    name = module.type
    if module.home.startswith("torch.nn."):
        return "Linear" if name == _LINEAR_OF_ATTENTION else name if name in _TORCH else None
    if _DROP_PATH.search(name):
        return "DropPath"
    if name == "Conv1D" and (weight := module.tensors.get("weight")) and len(weight.shape) == 2:
        return "Conv1D"
    leaf = not module.children and not module.tensors and rate_of(module) is not None
    if leaf and _PRIVATE_DROPOUT.search(name):
        return name if _OTHER_NOISE.search(name) else "Dropout"
    return None


def rate_of(module: FileModule) -> float | None:
    """The rate, under any of the names that it goes by."""
    for name in _RATES:
        value = module.attributes.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value) if -1e9 < value < 1e9 else None  # JSON knows no NaN
    return None


def _site(module: FileModule, op: str, kind: str = "module") -> dict[str, Any]:
    weight = module.tensors.get("weight") if op in _SHAPES else None
    sizes = [module.attributes.get(name) for name in _SHAPES.get(op, ())]
    shape = [size for size in sizes if type(size) is int and 0 <= size < 2**50]
    if op == "Conv1D" and weight is not None:
        shape = list(weight.shape)
    return {
        "path": module.paths[0],
        "kind": kind,
        "op": op,
        "type": module.type,
        "p": None if op in _SHAPES else rate_of(module),
        "calls": 0 if module.type == _LINEAR_OF_ATTENTION else None,
        "source": None,
        "parameters": sum(tensor.size for tensor in module.tensors.values() if tensor.trainable),
        "device": None,
        "dtype": None if weight is None else weight.dtype,
        "paths": module.paths,
        "shape": shape if op in _SHAPES else None,
        "training": module.training,
        "variant": next((edit["after"] for edit in module.grafts), None),
    }


def _grafted_call(module: FileModule, edit: dict[str, Any]) -> dict[str, Any]:
    """A place that no module stands for, and that shows itself by its graft."""
    source = edit.get("source")
    return {
        **_site(module, edit["op"], "call"),
        "p": None,
        "calls": None,
        "source": source if isinstance(source, str) else None,
        "parameters": 0,
        "shape": None,
        "dtype": None,
        "variant": edit["after"],
        "written": edit["before"],
    }


class Files:
    """A file, or all files of a folder, as they were read.

    Attributes:
        path: of the file or the folder.
        reports: one for each file, that of the model first.
        verdicts: on all of them together.
    """

    def __init__(self, path: Path, allow: Iterable[str] = ()) -> None:
        self.path = path
        self.folder = path.is_dir()
        self.reports = read_folder(path, tuple(allow)) if self.folder else [read(path, tuple(allow))]
        self.verdicts = Verdicts()
        for report in self.reports:
            self.verdicts.add(report.verdicts, self._name(report) if self.folder else "")

    def _name(self, report: FileReport) -> str:
        return visible(str(report.path.relative_to(self.path))) if self.folder else visible(report.path.name)

    def check(self, *, names: bool = True, model: bool = True) -> None:
        """Raise what stands against going on.

        Args:
            names: unknown names do.
            model: so does a folder or a file without any model.

        Raises:
            RefusedError: loading would run what no model needs, or call what is not known to be harmless.
            FileError: there is no model.
        """
        empty = not any(report.model for report in self.reports)
        reports = [report for report in self.reports if not (self.folder and report.other)]
        error = next((report.error for report in reports if report.error), None)
        if self.verdicts.dangerous or (self.verdicts.unknown and (names or (empty and model))):
            raise RefusedError(self.verdicts, str(self.path), error if empty else None)
        if empty and model:
            raise error or FileError(
                "the folder holds no model",
                where=str(self.path),
                remedy="give a folder with a config.json or a .safetensors file",
            )

    @property
    def model(self) -> FileModel:
        """The model.

        Raises:
            FileError: there is none.
        """
        self.check(names=False)
        return next(report.model for report in self.reports if report.model)

    def notes(self) -> list[str]:
        """What a plan beside the model says, and the verdict on each file of a folder."""
        plan = _told_by_plan(self.path)
        if not self.folder:
            return plan
        links = [report for report in self.reports if report.path.is_dir()]
        judged = [report for report in self.reports if not (report.other or report in links)]
        told = [f"{self._name(report)}: {_told(report)}" for report in judged]
        told += [f"{self._name(report)}: {report.error.what}" for report in links if report.error]
        others = len(self.reports) - len(judged) - len(links)
        return plan + told + ([f"{others} other files hold no pickle"] if others else [])

    def facts(self) -> dict[str, Any]:
        """The verdicts as plain JSON values."""
        return {
            **self.verdicts.facts(),
            "sha256": "" if self.folder else sha256(self.path),
            "files": {self._name(report): _told(report) for report in self.reports},
        }

    def closing(self) -> str:
        """The last line of what is printed of clean files.

        Raises:
            FileError: they are not: the names are unknown, or one file cannot be read.
        """
        self.check(model=False)
        for report in self.reports:
            if report.error and report.failed:
                raise report.error
        imports = ", ".join(map(visible, sorted(self.verdicts.imports))) or "nothing"
        digest = "" if self.folder else sha256(self.path)
        return f"No unknown names. Loading would import: {imports}." + (f" sha256 {digest}" if digest else "")


def _told(report: FileReport) -> str:
    verdicts = report.verdicts
    if verdicts.dangerous:
        return f"dangerous: {'; '.join(verdicts.dangerous[:3])}"
    if verdicts.unknown:
        return f"unknown names: {', '.join(map(visible, list(verdicts.unknown)[:3]))}"
    if report.error and report.failed:
        return report.error.what
    return "no unknown names" + ("" if report.model else ", no model")


class Facts(View):
    """A view of these facts; `closing` gives the last line, or raises what stands in its place."""

    def __init__(self, facts: dict[str, Any], closing: Callable[[], str] | None = None) -> None:
        self.facts, self.closing = facts, closing

    def to_dict(self) -> dict[str, Any]:
        """The view as plain JSON values."""
        return self.facts


def plan_beside(path: Path) -> Path:
    """Where the plan of a model stands: `NAME.regraft.json` beside `NAME.pt`, `regraft.json` in a folder."""
    name = path.name.removesuffix(".safetensors.index.json").removesuffix(path.suffix)
    return path / PLAN if path.is_dir() else path.with_name(f"{name}.{PLAN}")


def _told_by_plan(path: Path) -> list[str]:
    """What regraft does to a model, as the plan that was saved beside it says."""
    plan = plan_beside(path)
    try:
        values = json.loads(plan.read_text(encoding="utf-8"))
        told = [counted(len(values["grafted"]), "graft")]
        if "rdrop" in values:
            told.append(f"R-Drop({', '.join(f'{key}={value!r}' for key, value in values['rdrop'].items())})")
        for state in values.get("schedules", ()):
            told.append(f"rates on a schedule, {state['steps_done']} of {state['curve']['steps']} steps done")
        for limits in values.get("max_norm", ()):
            told.append(f"max-norm({', '.join(f'{key}: {bound}' for key, bound in limits['rules'])})")
    except OSError:
        return []
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
        return [f"{visible(plan.name)} is no plan that can be read"]
    return [visible(f"{plan.name}: {', '.join(told)}")]


def inspection_of(model: FileModel, files: Files) -> Facts:
    """What a file says of its model's sites."""
    sites = sites_of(model)
    notes = list(model.notes)
    if model.form == "module" and files.verdicts.verdict == "known":
        notes[0] += " (--trust loads and probes it)"
    shown = _inspection(model.path.name if model.form == "weights" else model.root.type, files.facts())
    grafted = any(site["variant"] for site in sites)
    said = {"answer": answer_of(sites), "paste": command("revert", str(model.path)) if grafted else ""}
    shown |= {"notes": [*notes, *files.notes()], "sites": sites, "summary": said}
    if model.form == "weights":
        shown["summary"] = _answer("Weights alone do not tell whether this model regularizes.")
    return Facts(shown, files.closing)


def command(name: str, model: str, *options: str) -> str:
    """A command to paste."""
    return f"regraft {shlex.join([name, model, *options])} -o OUT"


def no_model(files: Files, error: FileError) -> Facts:
    """What is said of a file that was read to its end and holds no model."""
    answer = _answer(f"{error.what[:1].upper()}{error.what[1:]}.")
    return Facts({**_inspection(files.path.name, files.facts()), "summary": answer}, files.closing)


def with_verdicts(view: View, files: Files, notes: Iterable[str] = ()) -> Facts:
    """A view of a model, with the verdicts on the files that it came from."""
    facts = view.to_dict()
    shown = [*facts.get("notes", []), *notes, *files.notes()]
    return Facts({**facts, "notes": shown, "verdict": files.facts()}, files.closing)


def refusal(error: FileError, verdicts: Verdicts) -> Facts:
    """Why files are not shown."""
    shown = _inspection(Path(error.where).name, verdicts.facts())
    return Facts({**shown, "notes": [error.what], "summary": _answer(f"Refused: {error.remedy}.")})


def _answer(answer: str) -> dict[str, str]:
    return {"answer": answer, "paste": ""}


def _inspection(model: str, verdict: dict[str, Any]) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "view": "inspection",
        "model": model,
        "notes": [],
        "probe": {"ran": False, "how": None, "reason": None, "seconds": None},
        "read": "read from the file, not run",
        "verdict": verdict,
        "sites": [],
        "findings": [],
    }
