"""The inspection of a file: the same view as of a model in memory, made without torch."""

from __future__ import annotations

from typing import Any

from regraft.cli.reading.model import NOT_RUN, ReadModel
from regraft.cli.reading.sites import sites_of
from regraft.report.inspection_page import summary
from regraft.report.view import SCHEMA, View


class FileInspection(View):
    """What a file says of its model's sites."""

    def __init__(self, model: ReadModel) -> None:
        self.model = model
        sites = sites_of(model)
        self.facts: dict[str, Any] = {
            "schema": SCHEMA,
            "view": "inspection",
            "model": model.root.type if model.form != "weights" else model.path.name,
            "notes": list(model.notes),
            "probe": {"ran": False, "how": None, "reason": None, "seconds": None},
            "read": NOT_RUN,
            "sites": sites,
            "findings": [],
        }
        if model.form == "weights":
            self.facts["summary"] = {
                "answer": "Weights alone do not tell whether this model regularizes.",
                "paste": "",
            }
        else:
            self.facts["summary"] = summary(sites)

    def to_dict(self) -> dict[str, Any]:
        """The inspection as plain JSON values."""
        return self.facts
