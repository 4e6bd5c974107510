"""Old home of what recognizes a module, until nothing above imports it from here."""

from __future__ import annotations

from regraft.find.recognize import family_of, never_runs, op_of, rate_name
from regraft.ops import FAMILIES, PLAIN
from regraft.ops import HIDDEN as OPAQUE

__all__ = ["FAMILIES", "OPAQUE", "PLAIN", "family_of", "never_runs", "op_of", "rate_name"]
