"""What a graft of every dropout does to one model of the zoo, seen by the independent recorder."""

from __future__ import annotations

import copy
import gc
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .entry import Entry, Inputs, forward, tensors
from .recorder import DROP_PATH, PLAIN, Call, record

RULES = {"Dropout": "gaussian", "DropPath": "droppath"}
_PLAIN_VALUES = (int, float, str, bool, type(None))
_HOOKS = tuple(name for name in vars(nn.Module()) if name.endswith("_hooks") or "_hooks_" in name)


@dataclass
class Row:
    """One model of the zoo, before and after. The attributes are the keys of the JSON."""

    library: str
    name: str
    model: str = ""
    plain: int = 0
    drop_path: int = 0
    walked: int = 0
    """Of the plain calls, those that a walk over the modules reaches."""
    apart: dict[str, int] = field(default_factory=dict)
    """Calls of the kinds with selectors of their own: dropout2d, alpha_dropout, ..."""
    other_draws: dict[str, int] = field(default_factory=dict)
    """Random draws that are no dropout, by source line."""
    reached_plain: int = 0
    reached_drop_path: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    """Calls left, by the reason that the report gives."""
    silent: list[str] = field(default_factory=list)
    """Calls left that no line of the report explains."""
    balance: dict[str, int] = field(default_factory=dict)
    """What the report says of the draws that its probe saw."""
    unlisted: list[str] = field(default_factory=list)
    """Lines that draw and are no dropout, which the report does not list."""
    unseen: list[str] = field(default_factory=list)
    """Sites that the report calls unconfirmed, though they are called on the inputs that it was given."""
    lost: int = 0
    """Calls gone with no draw of a variant in their place."""
    unmatched: list[str] = field(default_factory=list)
    """Rules that matched nothing, though the recorder saw such calls."""
    eval_differs: bool = False
    revert_differs: list[str] = field(default_factory=list)
    probe: str | None = None
    """Why the probe did not run."""
    error: str | None = None
    """What broke, and where."""
    seconds: float = 0.0

    @property
    def calls(self) -> int:
        return self.plain + self.drop_path

    @property
    def reached(self) -> int:
        return self.reached_plain + self.reached_drop_path


def walk_row(entry: Entry) -> Row:
    """The row of a model as it is, without regraft."""
    return examine(Row(entry.library, entry.name), entry, record, _count)


def graft_row(entry: Entry, given: bool | None = None) -> Row:
    """The whole row: graft, look again, compare, revert; see `examine`."""

    def look(model: nn.Module, inputs: Inputs) -> Any:
        return record(model, inputs, own=(_own_folder(),))

    return examine(Row(entry.library, entry.name), entry, look, _count, _apply, _compare, given)


def examine(
    row: Any,
    entry: Entry,
    look: Callable[[nn.Module, Inputs], Any],
    count: Callable[[Any, nn.Module, Any], None],
    graft: Callable[[Any, nn.Module, Inputs | None], dict[str, Any] | None] | None = None,
    compare: Callable[[Any, nn.Module, Any, Any, dict[str, Any], bool], None] | None = None,
    given: bool | None = None,
) -> Any:
    """Fill a row: look at a model, graft it, look again, compare, and revert.

    Args:
        row: what to fill: a `Row` or the like.
        entry: the model.
        look: what a forward shows.
        count: puts what the model shows as it is into the row.
        graft: returns the report as plain values, or None if there is nothing to graft; without it the
            row is that of the model as it is.
        compare: puts into the row what became of it, given both looks, the report and `given`.
        given: hand the zoo's inputs to the probe; by default only where regraft makes none itself.
    """
    start, step = time.perf_counter(), "zoo"
    try:
        model, inputs = entry.build()
        row.model = type(model).__name__
        # A copy runs first, so that the model is grafted as users graft it: before its first forward.
        twin = copy.deepcopy(model)
        fresh = snapshot(twin.train())
        reference = _eval(twin, inputs)
        before = look(twin.train(), inputs)
        count(row, twin, before)
        if graft is None or compare is None:
            return row
        own_doing = differences(fresh, snapshot(twin))  # what a forward of this model changes by itself
        del twin
        kept = _buffers(model)
        was = snapshot(model)
        step = "apply"
        given = entry.library not in ("hf", "timm", "peft") if given is None else given
        report = graft(row, model, inputs if given else None)
        if report is not None:
            step = "training"
            after = look(model, inputs)
            _backward(getattr(after, "output", None))
            _put_back(kept)
            step = "compare"
            compare(row, model, before, after, report, given)
            step = "eval"
            row.eval_differs = not report["mended"] and not _equal(reference, _eval(model, inputs))
            model.train()
        step = "revert"
        import regraft

        regraft.revert(model)
        row.revert_differs = [name for name in differences(was, snapshot(model)) if name not in own_doing]
    except Exception as error:
        row.error = f"{step}: {_first_line(error)}"
    finally:
        row.seconds = round(time.perf_counter() - start, 3)
        gc.collect()  # modules and frames refer to one another, and the models are large
    return row


def _count(row: Row, model: nn.Module, recording: Any) -> None:
    row.plain, row.drop_path = len(recording.plain), len(recording.drop_path)
    row.walked = sum(call.walked for call in recording.plain)
    row.apart = dict(Counter(call.kind for call in recording.calls if call.kind not in PLAIN | DROP_PATH))
    row.other_draws = dict(Counter(call.source for call in recording.other))


def _apply(row: Row, model: nn.Module, inputs: Inputs | None) -> dict[str, Any] | None:
    """The report as plain data; None if no rule matches."""
    import regraft

    counts = {"Dropout": row.plain, "DropPath": row.drop_path}
    rules = {name: RULES[name] for name, count in counts.items() if count}
    while rules:
        try:
            report = regraft.apply(model, dict(rules), inputs=inputs)
        except regraft.RegraftError as error:
            missed = [name for name in rules if f"'{name}'" in str(error) or f'"{name}"' in str(error)]
            if "match" not in str(error) or not missed:
                raise
            row.unmatched += missed
            row.skipped |= {f"an error: the rule {name!r} matches nothing": counts[name] for name in missed}
            rules = {name: variant for name, variant in rules.items() if name not in missed}
        else:
            found: dict[str, Any] = report.to_dict()
            row.probe = None if found["probe"]["ran"] else found["probe"]["reason"]
            return found
    return None


def _compare(
    row: Row, model: nn.Module, before: Any, after: Any, report: dict[str, Any], given: bool
) -> None:
    row.balance = report["balance"]
    listed = {str(one["source"]) for one in report["left"]} | {
        str(one["source"]) for one in report["skipped"]
    }
    unconfirmed = {item["path"] for item in report["grafted"] if item["calls"] is None}
    row.unseen = sorted({call.path for call in before.calls} & unconfirmed) if given else []
    row.unlisted = [source for source in row.other_draws if source not in listed]
    left_plain, left_path = after.plain, after.drop_path
    row.reached_plain = row.plain - len(left_plain)
    row.reached_drop_path = row.drop_path - len(left_path)
    reasons: Counter[str] = Counter()
    refused = {kind for name in row.unmatched for kind in (PLAIN if name == "Dropout" else DROP_PATH)}
    for call in [*left_plain, *left_path]:
        if call.kind in refused:
            continue
        reason = explained(call, report["skipped"])
        if reason is None:
            row.silent.append(f"{call.kind} in {call.path or '(the model)'} ({call.type}) at {call.source}")
        else:
            reasons[reason] += 1
    row.skipped |= dict(reasons)
    row.lost = max(0, row.reached - after.own_draws)


def explained(call: Call, skipped: list[dict[str, Any]]) -> str | None:
    """The reason the report gives for a call that it left, if it gives one for that place."""
    for skip in skipped:
        if call.path == skip["path"] or call.path in skip["paths"]:
            return str(skip["reason"])
    return None


def _own_folder() -> str:
    import regraft

    return os.path.dirname(os.path.abspath(regraft.__file__)) + os.sep


def _eval(model: nn.Module, inputs: Inputs) -> list[torch.Tensor]:
    torch.manual_seed(1)
    with torch.no_grad():
        return [found.clone() for found in tensors(forward(model.eval(), inputs))]


def _equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return len(ours) == len(theirs) and all(
        one.shape == other.shape and torch.equal(torch.nan_to_num(one), torch.nan_to_num(other))
        if one.is_floating_point()
        else torch.equal(one, other)
        for one, other in zip(ours, theirs, strict=True)
    )


def _backward(output: Any) -> None:
    trained = [found for found in tensors(output) if found.requires_grad and not found.is_complex()]
    losses = [found.float().mean() for found in trained]
    if losses:
        torch.stack(losses).sum().backward()


def _buffers(model: nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(buffer, buffer.clone()) for buffer in model.buffers()]


def _put_back(kept: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    with torch.no_grad():
        for buffer, value in kept:
            buffer.copy_(value)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that a revert must bring back, by name; objects by identity."""
    found: dict[str, Any] = {"state keys": tuple(model.state_dict(keep_vars=True))}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found[f"identity of {name}"] = id(parameter)
    for path, module in model.named_modules(remove_duplicate=False):
        found[f"module at {path}"] = id(module)
        found[f"class of {path}"] = type(module)
        found[f"attributes of {path}"] = tuple(module.__dict__)
        found[f"mode of {path}"] = module.training
        found[f"hooks of {path}"] = [tuple(module.__dict__.get(name, {}).items()) for name in _HOOKS]
        found[f"values of {path}"] = {k: v for k, v in vars(module).items() if isinstance(v, _PLAIN_VALUES)}
    return found


def differences(was: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What is not as it was."""
    return [key for key in {**was, **now} if was.get(key, "absent") != now.get(key, "absent")]


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:300]


def quiet() -> None:
    """Single-threaded and without the libraries' chatter."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module=r"(torch|torchvision|timm|transformers|peft)(\.|$)")
