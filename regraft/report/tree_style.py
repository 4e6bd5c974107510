"""The style of the tree of an HTML page."""

from __future__ import annotations

EXPLORER_STYLE = """
.explorer { margin-top: 20px; border: 1px solid var(--line); border-radius: 8px; }
.explorer[hidden] { display: none; }
.explorer .tools { display: flex; flex-wrap: wrap; gap: 8px; align-items: center; padding: 10px 14px;
  background: var(--panel); border-bottom: 1px solid var(--line); border-radius: 8px 8px 0 0;
  position: sticky; top: 0; z-index: 1; }
.explorer input { flex: 1 1 12rem; min-width: 0; font: inherit; padding: 6px 10px; color: var(--text);
  background: var(--ground); border: 1px solid var(--line); border-radius: 6px; }
.explorer button { font: inherit; font-size: 13px; padding: 6px 10px; color: var(--text); cursor: pointer;
  background: var(--ground); border: 1px solid var(--line); border-radius: 6px; }
.explorer button:hover { border-color: var(--quiet); }
.explorer :focus-visible { outline: 2px solid var(--rule); outline-offset: -1px; }
.explorer #regraft-shown { color: var(--quiet); font-size: 13px; white-space: nowrap; }
.explorer .chips { display: flex; flex-wrap: wrap; gap: 6px 18px; padding: 10px 14px 4px; }
.explorer .chips:empty { display: none; }
.explorer .chipset { display: flex; flex-wrap: wrap; gap: 6px; }
.explorer .chip { border-radius: 99px; padding: 3px 10px; }
.explorer .chip b { color: var(--quiet); font-weight: 400; }
.explorer .chip[aria-pressed=true] { background: var(--rule); color: var(--ground);
  border-color: var(--rule); }
.explorer .chip[aria-pressed=true] b { color: inherit; }
.tree { padding: 6px 0 10px; max-height: 75vh; overflow: auto; font-size: 13px; }
.tree .row { display: grid; grid-template-columns: minmax(13rem, 4fr) 8fr 5.5rem minmax(3rem, 1fr); gap: 12px;
  align-items: baseline; padding: 2px 14px; cursor: default; content-visibility: auto;
  contain-intrinsic-size: auto 25px; }
.tree .row[aria-expanded] { cursor: pointer; }
.tree .row:hover { background: var(--panel); }
.tree .name { padding-left: calc(var(--level) * 14px); overflow-wrap: anywhere; display: flex; }
.tree .group .name code { font-weight: 600; }
.tree .twist { flex: none; width: 14px; color: var(--quiet); }
.tree [aria-expanded] .twist::before { content: "\\25B8"; }
.tree [aria-expanded=true] .twist::before { content: "\\25BE"; }
.tree .sides { display: grid; grid-template-columns: 1fr 1fr; gap: 8px; align-items: start; }
.tree code, .tree del, .tree ins { font: 12.5px/1.5 var(--mono); }
.regraft .tree del, .regraft .tree ins { display: inline-block; text-indent: 0; padding: 0 6px;
  border-radius: 4px; overflow-wrap: anywhere; justify-self: start; }
.regraft .tree del::before, .regraft .tree ins::before { content: none; }
.tree .status { color: var(--quiet); white-space: nowrap; }
.tree .s-never-runs .status, .tree .s-skipped .status, .tree .s-rate-0 .status { color: var(--warn); }
.tree .s-grafted .status, .tree .s-to-graft .status, .tree .s-added .status { color: var(--new); }
.tree .s-removed .status { color: var(--old); }
.tree .side, .tree .count { color: var(--quiet); overflow: hidden; text-overflow: ellipsis; }
.tree .count { grid-column: 3 / span 2; }
.tree .facts { display: grid; grid-template-columns: max-content 1fr; gap: 2px 14px; margin: 2px 14px 8px;
  padding: 8px 12px; border-left: 2px solid var(--rule); background: var(--panel);
  margin-left: calc(var(--level) * 14px + 34px); }
.tree .facts dt { color: var(--quiet); }
.tree .facts dd { margin: 0; color: var(--text); overflow-wrap: anywhere; }
.tree mark { background: var(--warn-ground); color: inherit; border-radius: 2px;
  box-shadow: 0 0 0 1px var(--warn); }
.tree .more { display: block; margin: 4px 14px 4px 34px; }
@media (max-width: 640px) {
  .regraft { padding: 16px 10px 32px; }
  .tree .row { grid-template-columns: 1fr auto; gap: 0 10px; padding: 5px 10px;
    contain-intrinsic-size: auto 44px; }
  .tree .name { grid-column: 1; grid-row: 1; } .tree .status, .tree .count { grid-column: 2; grid-row: 1; }
  .tree .sides { grid-column: 1 / -1; grid-template-columns: 1fr; gap: 2px;
    padding-left: calc(var(--level) * 14px + 14px); }
  .tree .group .sides, .tree .side { display: none; }
  .tree { max-height: none; } .explorer .tools { position: static; }
  .explorer input { flex-basis: 100%; }
}
@media print { .explorer .tools, .explorer .chips { display: none; } .tree { max-height: none; } }
"""
