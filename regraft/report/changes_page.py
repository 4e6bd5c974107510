"""The page of a plan or a report: what is grafted, as a diff, and what is skipped, with the reason."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from regraft.report.document import (
    Document,
    Facts,
    Section,
    calls_cell,
    counted,
    folded,
    folded_keys,
    grouped,
    kind_cell,
    probe_facts,
    rate_texts,
    rule_text,
    skipped_sections,
)

_EACH = "a rule for each site"
"""In place of the rules of a saved plan, which names each of its sites."""
_VERBS = {"plan": "to graft", "report": "grafted"}


def changes_page(view: Facts) -> Document:
    """The page of a plan (what would change) or of a report (what has changed)."""
    grafted, skipped = view.get("grafted", []), view.get("skipped", [])
    mended, keys = view.get("mended", []), view.get("state_keys", [])
    facts, notes = probe_facts(view)
    if view["view"] == "report" and grafted and not keys:
        facts.append("no new state-dict keys")
    parts = [f"{counted(len(grafted), 'site')} {_VERBS[view['view']]}", f"{len(skipped)} skipped"]
    balance = view.get("balance")
    unconfirmed = balance.get("unconfirmed", 0) if isinstance(balance, Mapping) else 0
    parts[1:1] = [f"{unconfirmed} of them unconfirmed (give inputs=)"] if unconfirmed else []
    parts += [f"{len(mended)} mended"] if mended else []
    rules, probed = view.get("rules", []), bool((view.get("probe") or {}).get("ran"))
    return Document(
        view=view["view"],
        model=view.get("model", ""),
        headline=", ".join(parts),
        facts=facts,
        notes=[*view.get("notes", []), *notes],
        sections=[
            *change_sections(grafted, rules, probed),
            *skipped_sections(skipped),
            *_mended_sections(mended),
            *_key_sections(keys),
        ],
    )


def change_sections(rows: Sequence[Facts], rules: Sequence[Any] = (), probed: bool = True) -> list[Section]:
    """Rows with `before` and `after`, those alike in one section."""
    rates = rate_texts(rows, _rates, lambda row: (row.get("rule"), _texts(row, ["#"] * len(_rates(row)))))

    def rule_of(row: Facts) -> str:
        rule = row.get("rule")
        return rule_text(*rules[rule]) if rule is not None and 0 <= rule < len(rules) else ""

    def alike(row: Facts) -> tuple[Any, ...]:
        shared = _EACH if f'@{row["path"]}": ' in (rule := rule_of(row)) else rule
        ranges = any(".." in rate for rate in rates[id(row)])
        return shared, *_texts(row, rates[id(row)]), row.get("cost"), ranges or row.get("strength")

    def cells(row: Facts) -> tuple[str, ...]:
        return kind_cell(row), calls_cell(row.get("calls"), probed=probed) if "calls" in row else ""

    sections = []
    for (shared, before, after, cost, _), group in grouped(rows, alike).items():
        title = rule_of(group[0]) if len(group) == 1 else shared
        # Of a range of rates, the strengths at its ends.
        strengths = [row["strength"] for row in (group[0], group[-1]) if row.get("strength")]
        notes = {"cost": cost, "strength": " .. ".join(dict.fromkeys(strengths))}
        costs = tuple(f"{name}: {text}" for name, text in notes.items() if text)
        table = folded(group, cells)
        section = Section("change", title, len(group), table, ("kind", "calls"), "", "", before, after, costs)
        sections.append(section)
    return sections


def _rates(row: Facts) -> list[float]:
    """The row's own rate and the one that it is given, as far as they are numbers."""
    rates = [row.get("p"), (row.get("options") or {}).get("p")]
    return [rate for rate in rates if isinstance(rate, (int, float))]


def _texts(row: Facts, written: Sequence[str]) -> tuple[str, str]:
    """Before and after, with the row's rates as `written`."""
    words = {f"{rate:g}": text for rate, text in zip(_rates(row), written, strict=True)}
    before, after = row.get("before") or "", row.get("after") or ""
    if not words:
        return before, after
    rate = re.compile(rf"\bp=({'|'.join(map(re.escape, words))})(?![0-9.])")
    before, after = (rate.sub(lambda found: f"p={words[found[1]]}", text) for text in (before, after))
    return before, after


def _mended_sections(mended: Sequence[Facts]) -> list[Section]:
    return [
        Section("mended", f"mended {counted(len(rows), 'site')}", len(rows), folded(rows), text=what)
        for what, rows in grouped(mended, lambda row: str(row["what"])).items()
    ]


def _key_sections(keys: Sequence[str]) -> list[Section]:
    title = counted(len(keys), "new key") + " in the state dict"
    return [Section("keys", title, len(keys), folded_keys(keys))] if keys else []
