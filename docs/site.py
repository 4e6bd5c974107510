"""What the site takes from outside `docs/`: the benchmarks' tables, the list of changes, the docstrings.

Their pages stand where the links of the repository lead, one folder higher: `../benchmarks/PASSES.md` in
`docs/passes.md` is `benchmarks/PASSES.md` on the site.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = ("benchmarks/README.md", "benchmarks/RESULTS.md", "benchmarks/PASSES.md", "CHANGELOG.md")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages from outside."""
    for page in PAGES:
        files.append(File.generated(config, page, abs_src_path=str(ROOT / page)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead the links between `docs/` and the rest of the repository to where the pages are on the site."""
    if page.file.src_uri in PAGES:
        return markdown.replace("](../docs/", "](../")
    depth = page.file.src_uri.count("/")
    outside = "|".join(map(re.escape, PAGES))
    return re.sub(rf"\]\((?:\.\./){{{depth + 1}}}({outside})", rf"]({'../' * depth}\1", markdown)


class Docstrings(griffe.Extension):
    """Docstrings as the API pages read them: an example is code, and a warning a paragraph."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rename the sections that the Google style spells differently."""
        if obj.docstring is not None:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = re.sub(r"^Warns:$", "Warning:", text, flags=re.MULTILINE)
