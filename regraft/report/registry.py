"""Which page shows which view."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from regraft.errors import RegraftError
from regraft.report import changes_page, diff_page, inspection_page, training_pages
from regraft.report.document import Document, Facts, balance_sections

_PAGES: dict[str, Callable[[Facts], Document]] = {
    "inspection": inspection_page.inspection_page,
    "plan": changes_page.changes_page,
    "report": changes_page.changes_page,
    "max_norm": training_pages.max_norm_page,
    "advice": training_pages.advice_page,
    "diff": diff_page.diff_page,
    "verification": diff_page.verification_page,
}


def document_of(view: Facts) -> Document:
    """The document of the dictionary that a view's `to_dict` returns.

    Raises:
        RegraftError: the dictionary is of no known view.
    """
    try:
        page = _PAGES[view["view"]]
    except KeyError:
        raise RegraftError(f"a view of the kind {view.get('view')!r} cannot be shown") from None
    document = page(view)
    return replace(document, sections=[*document.sections, *balance_sections(view)])
