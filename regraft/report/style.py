"""The style of the HTML views, light and dark."""

from __future__ import annotations

from regraft.report.tree_style import EXPLORER_STYLE

_COLOURS_LIGHT = """
  --ground: #ffffff; --panel: #f6f7f9; --line: #e3e6ea; --text: #1c2128; --quiet: #656d76;
  --old: #b42318; --old-ground: #fdeceb; --new: #176f3b; --new-ground: #e7f6ec;
  --mark: #8b3fb8; --rule: #0b6bab; --warn: #8a5a00; --warn-ground: #fff6e0;
"""
_COLOURS_DARK = """
  --ground: #101418; --panel: #181d23; --line: #2b323a; --text: #e4e8ec; --quiet: #8f99a4;
  --old: #ff9c92; --old-ground: #3a1c1b; --new: #7fdca0; --new-ground: #14301f;
  --mark: #d3a4f0; --rule: #7cc4f5; --warn: #f0c46a; --warn-ground: #332810;
"""
_MONO = '--mono: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;'
_BODY = """
.regraft { color: var(--text); background: var(--ground); max-width: 72rem; line-height: 1.45;
  font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
.regraft code, .regraft pre { font: 13px/1.5 var(--mono);
  background: none; color: inherit; padding: 0; margin: 0; }
.regraft p, .regraft h1, .regraft h2 { margin: 0; padding: 0; border: 0; }
.regraft .view { color: var(--quiet); font-size: 13px; letter-spacing: .02em; }
.regraft h1 { font-size: 24px; font-weight: 650; line-height: 1.25; overflow-wrap: anywhere; }
.regraft .headline { font-size: 16px; margin-top: 4px; }
.regraft .facts { color: var(--quiet); font-size: 13px; margin-top: 2px; }
.regraft .note { background: var(--warn-ground); color: var(--warn); border-radius: 6px; padding: 8px 12px;
  margin-top: 12px; }
.regraft .answer { background: var(--panel); border-radius: 6px; padding: 12px 14px; margin-top: 16px; }
.regraft .answer p { font-weight: 600; }
.regraft .answer pre { margin-top: 6px; color: var(--new); white-space: pre-wrap; overflow-wrap: anywhere; }
.regraft section { margin-top: 20px; border: 1px solid var(--line); border-radius: 8px; overflow: hidden;
  padding-bottom: 6px; }
.regraft h2 { font-size: 14px; font-weight: 600; padding: 8px 14px; background: var(--panel);
  border-bottom: 1px solid var(--line); display: flex; justify-content: space-between; gap: 12px; }
.regraft .rule { color: var(--rule); font: 13px/1.6 var(--mono);
  overflow-wrap: anywhere; }
.regraft .count { color: var(--quiet); font-weight: 400; }
.regraft .said { display: block; padding: 10px 14px 0; }
.regraft .cost { padding: 2px 14px; color: var(--warn); font-size: 13px; }
.regraft .remedy { padding: 2px 14px 4px; color: var(--new); }
.regraft .diff { white-space: pre-wrap; overflow-wrap: anywhere; margin-bottom: 4px; }
.regraft del, .regraft ins { display: block; text-decoration: none;
  padding: 2px 14px 2px 30px; text-indent: -16px; }
.regraft .diff { font-size: 0; }
.regraft del, .regraft ins { font-size: 13px; }
.regraft del { background: var(--old-ground); color: var(--old); }
.regraft ins { background: var(--new-ground); color: var(--new); }
.regraft del::before { content: "\\2212\\a0"; } .regraft ins::before { content: "+\\a0"; }
.regraft table { border-collapse: collapse; width: 100%; margin: 4px 0 0; font-size: 13px; }
.regraft tr { background: none; }
.regraft td { padding: 3px 6px; vertical-align: top; text-align: left; border: 0; white-space: nowrap; }
.regraft td:first-child { padding-left: 14px; } .regraft td:last-child { padding-right: 14px; }
.regraft td.path { width: 100%; white-space: normal; overflow-wrap: anywhere; }
.regraft td.path b { color: var(--mark); font-weight: 400; }
.regraft td.lead, .regraft td.size { font-family: var(--mono); }
.regraft td.size { text-align: right; color: var(--quiet); }
.regraft td.times, .regraft td.source, .regraft td.trail { color: var(--quiet); }
.regraft td.times { text-align: right; }
.regraft .also { display: block; color: var(--quiet); padding-left: 1.5em; }
.regraft tr:hover { background: var(--panel); }
.regraft section.skip h2, .regraft section.finding h2, .regraft section.mend h2 { color: var(--warn); }
@media (max-width: 640px) {
  .regraft tr { display: flex; flex-wrap: wrap; padding: 4px 8px; } .regraft td { padding: 0 6px; }
  .regraft td:first-child, .regraft td:last-child { padding-left: 6px; padding-right: 6px; }
  .regraft td:empty { display: none; } .regraft td.path { width: auto; flex-basis: 100%; order: -1; }
}
"""
FRAGMENT_STYLE = (
    f".regraft {{{_MONO}{_COLOURS_LIGHT}  padding: 12px; border-radius: 8px; }}"
    f"@media (prefers-color-scheme: dark) {{ .regraft {{{_COLOURS_DARK}}} }}{_BODY}"
)
"""For a notebook: nothing outside the fragment is touched."""
PAGE_STYLE = (
    f":root {{{_MONO}{_COLOURS_LIGHT}}}@media (prefers-color-scheme: dark) {{ :root {{{_COLOURS_DARK}}} }}"
    f":root[data-theme=light] {{{_COLOURS_LIGHT} color-scheme: light; }}"
    f":root[data-theme=dark] {{{_COLOURS_DARK} color-scheme: dark; }}"
    "body { background: var(--ground); margin: 0; } .regraft { margin: 0 auto; padding: 28px 20px 48px; }"
    f"{_BODY}{EXPLORER_STYLE}"
)
