"""The pages of a difference between two models and of a verification."""

from __future__ import annotations

from collections.abc import Sequence

from regraft.report.changes_page import change_sections
from regraft.report.document import (
    Document,
    Facts,
    Section,
    counted,
    folded,
    folded_keys,
    grouped,
    kind_cell,
    probe_facts,
    rule_text,
)


def diff_page(view: Facts) -> Document:
    """The page of a difference between two models."""
    weights = view["weights"]
    parts = [f"{len(view[word])} {word}" for word in ("changed", "added", "removed")]
    nothing = not (view["changed"] or view["added"] or view["removed"] or weights["differ"])
    uncompared = view.get("uncompared", [])
    headline = "no difference" if nothing else ", ".join(parts)
    if nothing and uncompared:
        headline += f" in what was compared, {len(uncompared)} not compared"
    return Document(
        view="diff",
        model=view["model"] if view["model"] == view["other"] else f"{view['model']} and {view['other']}",
        headline=headline,
        facts=[_weights_fact(weights)],
        notes=list(view.get("notes", [])),
        sections=[
            *change_sections(view["changed"]),
            *_one_sided(view["removed"], "removed", "before"),
            *_one_sided(view["added"], "added", "after"),
            *_key_sections(weights["differ"], "tensor", "not the same"),
            *_key_sections(uncompared, "setting", "not compared"),
        ],
    )


def _weights_fact(weights: Facts) -> str:
    if weights["compared"] is None:
        return "weights not compared"
    how = "bit for bit" if weights["compared"] == "values" else "in shape"
    return f"{counted(weights['same'], 'tensor')} the same {how}, {len(weights['differ'])} not"


def _one_sided(rows: Sequence[Facts], word: str, column: str) -> list[Section]:
    return [
        Section(
            "sites", f"{word}: {what}", len(group), folded(group, lambda row: (kind_cell(row),)), ("kind",)
        )
        for what, group in grouped(rows, lambda row: str(row[column])).items()
    ]


def _key_sections(keys: Sequence[str], noun: str, word: str) -> list[Section]:
    title = f"{counted(len(keys), noun)} {word}"
    return [Section("keys", title, len(keys), folded_keys(keys))] if keys else []


_VERDICTS = {True: "pass", False: "FAIL", None: "not checked"}


def verification_page(view: Facts) -> Document:
    """The page of the promises, each with its outcome."""
    checks = view["checks"]
    failed = sum(check["passed"] is False for check in checks)
    unchecked = sum(check["passed"] is None for check in checks)
    parts = [f"{len(checks) - failed - unchecked} of {counted(len(checks), 'promise')} hold"]
    parts += [f"{failed} FAILED"] if failed else []
    parts += [f"{unchecked} not checked"] if unchecked else []
    facts, notes = probe_facts(view)
    rules = ", ".join(rule_text(*rule) for rule in view["rules"])
    return Document(
        view="verification",
        model=view["model"],
        headline=", ".join(parts),
        facts=[*facts, f"with {{{rules}}}"],
        notes=[*view.get("notes", []), *notes],
        sections=[
            Section(
                "check" if check["passed"] else "finding",
                f"{_VERDICTS[check['passed']]}: {check['promise']}",
                text=check["said"],
            )
            for check in checks
        ],
    )
