"""The notebook of the documentation runs from its first cell to its last, and what it shows is what it says."""

from __future__ import annotations

import ast
import json
from pathlib import Path

NOTEBOOK = Path(__file__).parents[2] / "docs" / "tour.ipynb"


def test_the_notebook_runs_and_its_views_show_themselves():
    cells = [
        cell
        for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
        if cell["cell_type"] == "code"
    ]
    names, pages = {}, 0
    for cell in cells:
        *body, last = ast.parse("".join(cell["source"])).body
        is_value = isinstance(last, ast.Expr)
        exec(compile(ast.Module(body if is_value else [*body, last], []), "notebook", "exec"), names)
        value = eval(compile(ast.Expression(last.value), "notebook", "eval"), names) if is_value else None
        if hasattr(value, "_repr_html_"):
            pages += value._repr_html_().count('<main class="regraft">')
        saved = [output.get("output_type") for output in cell["outputs"]]
        assert ("execute_result" in saved) == (value is not None)
    assert pages == 3
    losses = names["losses"]
    assert sum(losses[-5:]) < 4 * losses[0]
