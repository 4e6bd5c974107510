"""Old home of the table of operations, until nothing above imports it from here."""

from __future__ import annotations

from regraft.ops import ATTENTION, DROP_PATH, FUNCTIONS, MULTI_HEAD, OPS, Parsed, draws_rows
from regraft.ops import ROW_DRAWS as DRAWS

__all__ = ["ATTENTION", "DRAWS", "DROP_PATH", "FUNCTIONS", "MULTI_HEAD", "OPS", "Parsed", "draws_rows"]
