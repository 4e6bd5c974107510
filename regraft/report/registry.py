"""Which page shows which view."""

from __future__ import annotations

from collections.abc import Callable

from regraft.errors import RegraftError
from regraft.report import advice, changes, diff_page, limits, sites
from regraft.report.page import Facts, Page

_PAGES: dict[str, Callable[[Facts], Page]] = {
    "inspection": sites.inspection_page,
    "plan": changes.changes_page,
    "report": changes.changes_page,
    "max_norm": limits.limits_page,
    "advice": advice.advice_page,
    "diff": diff_page.diff_page,
    "verification": diff_page.verification_page,
}


def page_of(view: Facts) -> Page:
    """The page of the dictionary that a view's `to_dict` returns.

    Raises:
        RegraftError: it is of no view.
    """
    try:
        page = _PAGES[view["view"]]
    except KeyError:
        raise RegraftError(f"a view of the kind {view.get('view')!r} cannot be shown") from None
    return page(view)
