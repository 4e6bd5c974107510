"""What everything that regraft returns for reading has in common."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

SCHEMA = 1
"""Version of the JSON of all views; it changes when a key is removed or means something else."""


class View:
    """Mixin of plans, reports and inspections: the same facts as text, JSON, Markdown and HTML.

    A subclass gives `to_dict`; everything else is made from that. Printed to a terminal a view takes the
    terminal's width, and 100 columns elsewhere.

    Example:
        >>> class Hello(View):
        ...     def to_dict(self):
        ...         return {"schema": 1, "view": "plan", "model": "Net", "grafted": [], "skipped": []}
        >>> print(Hello())
        Net: 0 sites to graft, 0 skipped
    """

    def to_dict(self) -> dict[str, Any]:
        """The whole view as plain JSON values."""
        raise NotImplementedError(f"{type(self).__name__} has no to_dict")

    def to_json(self, indent: int | None = 2) -> str:
        """The view as JSON; the keys are the attributes' names."""
        return json.dumps(self.to_dict(), indent=indent, ensure_ascii=False, allow_nan=False)

    def to_markdown(self) -> str:
        """The view as Markdown, for an issue or a pull request."""
        from regraft.report.markdown import to_markdown

        return to_markdown(self.to_dict())

    def to_html(self) -> str:
        """The view as one HTML page that needs nothing else, not even a network."""
        from regraft.report.html import to_page

        return to_page(self.to_dict())

    def _repr_html_(self) -> str:
        from regraft.report.html import to_fragment

        return to_fragment(self.to_dict())

    def __str__(self) -> str:
        from regraft.report.text import stdout_width, to_text

        return to_text(self.to_dict(), width=stdout_width())

    # At a prompt a view is read, not rebuilt; a dataclass that inherits it needs repr=False.
    __repr__ = __str__

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from regraft.report.text import rich_lines

        return rich_lines(self.to_dict(), options)
