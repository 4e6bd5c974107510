"""The page of `regraft.suggest`: each piece of advice with its reason and its source."""

from __future__ import annotations

from regraft.report.page import Block, Facts, Page, counted, quoted, size


def advice_page(view: Facts) -> Page:
    """The page of an advice."""
    advice = view.get("advice", [])
    rules = [one["rule"] for one in advice if one.get("rule")]
    inside = ", ".join(f"{quoted(key)}: {quoted(value)}" for key, value in rules)
    examples = counted(view.get("examples", 0), "example")
    return Page(
        view="advice",
        model=view.get("model", ""),
        headline=f"{counted(len(advice), 'suggestion')} for a {view.get('kind', 'model')} with "
        f"{size(view.get('parameters', 0))} parameters that train on {examples}",
        facts=["advice, nothing of it is applied"],
        notes=list(view.get("notes", [])),
        answer="" if advice else "Nothing that has been published for such a model is missing here.",
        paste=f"regraft.apply(model, {{{inside}}})" if rules else "",
        blocks=[_block(one) for one in advice],
    )


def _block(one: Facts) -> Block:
    rule = one.get("rule")
    title = f"{quoted(rule[0])}: {quoted(rule[1])}" if rule else str(one.get("code"))
    return Block("sites", title, 1, [], text=f"{one['reason']} ({one['source']})")
