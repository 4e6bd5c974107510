"""Metadata that depends on where the repository is: the README's links as absolute addresses, and the URLs.

The address is that of the environment variable REGRAFT_REPOSITORY, or the one that GitHub Actions gives.
Without any, the long description has its pictures left out and its relative links as plain text, and there
are no URLs.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

_IMAGE = re.compile(r"!\[([^\]]*)\]\((?!https?:)([^)]+)\)\n*")
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((?!https?:|#)([^)]+)\)")


def repository() -> str:
    """The address of the repository, or an empty text."""
    on_actions = "/".join(os.environ.get(name, "") for name in ("GITHUB_SERVER_URL", "GITHUB_REPOSITORY"))
    return (os.environ.get("REGRAFT_REPOSITORY") or on_actions.strip("/")).rstrip("/")


def long_description(text: str, address: str) -> str:
    """The README with absolute links and pictures, or without them."""
    if not address:
        return _LINK.sub(r"\1", _IMAGE.sub("", text))
    text = _IMAGE.sub(rf"![\1]({address}/raw/main/\2)\n\n", text)
    return _LINK.sub(rf"[\1]({address}/blob/main/\2)", text)


def urls(address: str) -> dict[str, str]:
    """The project's own addresses."""
    pages = {
        "Repository": "",
        "Documentation": "/tree/main/docs",
        "Changelog": "/blob/main/CHANGELOG.md",
        "Issues": "/issues",
    }
    return {name: address + path for name, path in pages.items()} if address else {}


class Hook(MetadataHookInterface):
    """Fills in `readme` and `urls`."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Called by hatchling for the sdist and the wheel."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        address = repository()
        metadata["readme"] = {"content-type": "text/markdown", "text": long_description(text, address)}
        metadata["urls"] = urls(address)
