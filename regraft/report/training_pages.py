"""The pages of max-norm (which weights are bounded, and by what) and of advice."""

from __future__ import annotations

from regraft.report.document import (
    Document,
    Facts,
    Section,
    counted,
    folded,
    grouped,
    rule_text,
    size,
    skipped_sections,
)


def max_norm_page(view: Facts) -> Document:
    """The page of what `regraft.max_norm` returns."""
    limited, skipped, first = view.get("limited", []), view.get("skipped", []), view.get("first")
    rows, over = (sum(weight[name] for weight in limited) for name in ("rows", "over"))
    facts = [f"{over:,} over their bound when it was set"]
    if first is not None:
        facts.append(f"{first['over']:,} of {first['rows']:,} scaled back at the first step")
    groups = grouped(limited, lambda weight: (weight["op"], _bound(weight["bound"])))
    return Document(
        view="max_norm",
        model=view.get("model", ""),
        headline=f"{counted(rows, 'row')} of {counted(len(limited), 'weight')} bounded after every step, "
        f"{len(skipped)} skipped",
        facts=facts,
        notes=list(view.get("notes", [])),
        sections=[
            *(
                Section(
                    "sites",
                    f"{op}: norm at most {bound}",
                    len(group),
                    folded(group, _cells),
                    ("rows", "over"),
                )
                for (op, bound), group in groups.items()
            ),
            *skipped_sections(skipped, "weight"),
        ],
    )


def _bound(bound: object) -> str:
    return f"{str(bound).removesuffix('x')} times what it was" if isinstance(bound, str) else f"{bound:g}"


def _cells(weight: Facts) -> tuple[str, ...]:
    return f"{weight['rows']:,}", f"{weight['over']:,}" if weight["over"] else ""


def advice_page(view: Facts) -> Document:
    """The page of what `regraft.suggest` returns: each suggestion with its reason and its source."""
    advice = view.get("advice", [])
    rules = ", ".join(rule_text(*item["rule"]) for item in advice if item.get("rule"))
    examples = counted(view.get("examples", 0), "example")
    return Document(
        view="advice",
        model=view.get("model", ""),
        headline=f"{counted(len(advice), 'suggestion')} for a {view.get('kind', 'model')} with "
        f"{size(view.get('parameters', 0))} trainable parameters and {examples}",
        facts=["suggestions only, nothing is applied"],
        notes=list(view.get("notes", [])),
        answer="" if advice else "Nothing that has been published for such a model is missing here.",
        paste=f"regraft.apply(model, {{{rules}}})" if rules else "",
        sections=[
            Section(
                "sites",
                rule_text(*item["rule"]) if item.get("rule") else str(item.get("code")),
                text=f"{item['reason']} ({item['source']})",
            )
            for item in advice
        ],
    )
