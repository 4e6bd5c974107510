// The tree of a page: every site of the view below the names that lead to it. Plain text only: nothing
// from the model is ever markup, an address or code.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("regraft-data").textContent);
  const [PATH, OP, STATUS, BEFORE, AFTER, SIDE, FACTS] = [0, 1, 2, 3, 4, 5, 6];
  const MOST = 400; // children shown at once
  const FIRST = 40; // rows that a fresh page opens at most
  const tree = document.getElementById("regraft-tree");
  const search = document.getElementById("regraft-search");
  const shown = document.getElementById("regraft-shown");

  // ---- the tree of names ----
  const root = { name: "", path: "", rows: [], children: new Map(), open: true, level: 0 };
  data.rows.forEach((row, index) => {
    row.index = index;
    let node = root;
    for (const part of row[PATH] ? row[PATH].split(".") : []) {
      if (!node.children.has(part)) {
        const path = node.path ? node.path + "." + part : part;
        node.children.set(part, { name: part, path, rows: [], children: new Map(), open: false });
      }
      node = node.children.get(part);
    }
    node.rows.push(row);
  });
  // Names with one name below them and nothing else are written in one: encoder.layer
  const join = (node) => {
    for (const child of node.children.values()) join(child);
    for (const [name, child] of [...node.children]) {
      if (child.children.size !== 1 || child.rows.length) continue;
      const only = child.children.values().next().value;
      only.name = child.name + "." + only.name;
      node.children.set(name, only);
    }
  };
  join(root);
  const settle = (node, level) => {
    node.level = level;
    node.count = node.rows.length;
    node.kids = [...node.children.values()];
    for (const child of node.kids) {
      child.parent = node;
      settle(child, level + 1);
      node.count += child.count;
    }
    node.limit = MOST;
  };
  settle(root, 0);

  // ---- what is chosen ----
  const chosen = { op: new Set(), status: new Set(), words: [] };
  const filtering = () => chosen.op.size || chosen.status.size || chosen.words.length;
  const text = new Map();
  const textOf = (row) => {
    if (!text.has(row)) text.set(row, row.slice(0, FACTS).concat(row[FACTS].flat()).join(" ").toLowerCase());
    return text.get(row);
  };
  const fits = (row) =>
    (!chosen.op.size || chosen.op.has(row[OP])) &&
    (!chosen.status.size || chosen.status.has(row[STATUS])) &&
    chosen.words.every((word) => textOf(row).includes(word));
  let hits = 0;
  const mark = (node) => {
    node.fit = node.rows.filter(fits);
    hits += node.fit.length;
    node.seen = node.fit.length;
    for (const child of node.kids) node.seen += mark(child);
    return node.seen;
  };

  // ---- rows ----
  const make = (tag, cls, words) => {
    const made = document.createElement(tag);
    if (cls) made.className = cls;
    if (words) made.textContent = words;
    return made;
  };
  const lit = (place, words) => {
    const low = words.toLowerCase();
    let at = 0;
    for (;;) {
      const next = chosen.words
        .map((word) => [low.indexOf(word, at), word.length])
        .filter(([start]) => start >= 0)
        .sort((a, b) => a[0] - b[0])[0];
      if (!next || low.length !== words.length) break;
      place.append(words.slice(at, next[0]), make("mark", "", words.slice(next[0], next[0] + next[1])));
      at = next[0] + next[1];
    }
    place.append(words.slice(at));
    return place;
  };
  const item = (node, row) => {
    const line = make("div", "row" + (row ? " s-" + row[STATUS].replace(/[^a-z0-9]+/g, "-") : " group"));
    line.setAttribute("role", "treeitem");
    line.setAttribute("aria-level", String(node.level + 1));
    line.tabIndex = -1;
    line.style.setProperty("--level", String(node.level));
    const name = make("span", "name");
    name.append(make("span", "twist"), lit(make("code"), node.name || data.root));
    line.append(name);
    if (row) {
      const sides = make("span", "sides");
      if (row[BEFORE]) sides.append(lit(make(row[AFTER] ? "del" : "code", "before"), row[BEFORE]));
      if (row[AFTER]) sides.append(lit(make("ins", "after"), row[AFTER]));
      line.append(sides, make("span", "status", row[STATUS]), make("span", "side", row[SIDE]));
    } else {
      line.append(make("span", "sides"), make("span", "count", node.seen.toLocaleString("en") + (node.seen === 1 ? " site" : " sites")));
    }
    line.regraft = { node, row };
    const opens = row ? row === node.fit[0] && node.kids.some((kid) => kid.seen) : node.kids.length > 0;
    if (opens || (row && row[FACTS].length)) line.setAttribute("aria-expanded", "false");
    return line;
  };
  const facts = (line) => {
    const made = make("dl", "facts");
    made.style.setProperty("--level", line.style.getPropertyValue("--level"));
    for (const [what, said] of [["path", line.regraft.node.path || data.root], ...line.regraft.row[FACTS]]) {
      made.append(make("dt", "", what), lit(make("dd"), said));
    }
    return made;
  };

  const draw = () => {
    hits = 0;
    mark(root);
    const lines = [];
    const add = (node) => {
      const open = node === root || node.open || Boolean(chosen.words.length && node.level < 99);
      const kids = node.kids.filter((kid) => kid.seen);
      if (node !== root || node.fit.length) {
        const rows = node.fit.length ? node.fit : [null];
        rows.forEach((row, index) => {
          const line = item(node, row);
          if (index === 0 && kids.length) line.setAttribute("aria-expanded", String(open));
          lines.push(line);
          if (row && node.told && node.told.has(row)) {
            line.setAttribute("aria-expanded", "true");
            lines.push(facts(line));
          }
        });
      }
      if (!open) return;
      kids.slice(0, node.limit).forEach(add);
      if (kids.length > node.limit) {
        const more = make("button", "more", "show " + Math.min(MOST, kids.length - node.limit) + " more of " +
          kids.length.toLocaleString("en"));
        more.addEventListener("click", () => { node.limit += MOST; draw(); });
        lines.push(more);
      }
    };
    add(root);
    tree.replaceChildren(...lines);
    const first = tree.querySelector(".row");
    if (first) first.tabIndex = 0;
    shown.textContent = filtering()
      ? hits.toLocaleString("en") + " of " + data.rows.length.toLocaleString("en") + " sites"
      : data.rows.length.toLocaleString("en") + " sites";
  };

  // ---- folding ----
  const keyOf = ({ regraft: { node, row } }) => (row ? row.index : node.path);
  const redraw = (line) => {
    const key = keyOf(line);
    draw();
    focus([...tree.querySelectorAll(".row")].find((other) => keyOf(other) === key));
  };
  const toggle = (line, want) => {
    const { node, row } = line.regraft;
    const open = line.getAttribute("aria-expanded") === "true";
    if (want !== undefined && want === open) return false;
    if (!line.hasAttribute("aria-expanded")) return false;
    if (node.kids.length && (!row || row === node.fit[0])) node.open = !open;
    if (row) {
      node.told = node.told || new Set();
      if (open) node.told.delete(row); else node.told.add(row);
    }
    redraw(line);
    return true;
  };
  const every = (open) => {
    const set = (node) => { node.open = open; node.told = null; node.kids.forEach(set); };
    set(root);
    draw();
  };

  // ---- hands ----
  const focus = (line) => {
    if (!line) return;
    for (const other of tree.querySelectorAll('.row[tabindex="0"]')) other.tabIndex = -1;
    line.tabIndex = 0;
    line.focus();
  };
  tree.addEventListener("click", (event) => {
    const line = event.target.closest(".row");
    if (line && !String(window.getSelection())) toggle(line);
  });
  tree.addEventListener("keydown", (event) => {
    const line = event.target.closest(".row");
    if (!line || event.ctrlKey || event.metaKey || event.altKey) return;
    const lines = [...tree.querySelectorAll(".row")];
    const at = lines.indexOf(line);
    const steps = {
      ArrowDown: () => focus(lines[at + 1]),
      ArrowUp: () => focus(lines[at - 1]),
      Home: () => focus(lines[0]),
      End: () => focus(lines[lines.length - 1]),
      Enter: () => toggle(line),
      " ": () => toggle(line),
      ArrowRight: () => toggle(line, true) || focus(lines[at + 1]),
      ArrowLeft: () => {
        if (line.getAttribute("aria-expanded") === "true" && toggle(line, false)) return;
        focus(lines.slice(0, at).reverse().find((other) => other.regraft.node === line.regraft.node.parent));
      },
    };
    if (!steps[event.key]) return;
    event.preventDefault();
    steps[event.key]();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "/" && event.target !== search) {
      event.preventDefault();
      search.focus();
    } else if (event.key === "Escape" && event.target === search) {
      search.value = "";
      look();
    } else if (event.key === "ArrowDown" && event.target === search) {
      event.preventDefault();
      focus(tree.querySelector(".row"));
    }
  });
  const look = () => {
    chosen.words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    draw();
  };
  let soon = 0;
  search.addEventListener("input", () => { clearTimeout(soon); soon = setTimeout(look, 80); });
  for (const chip of document.querySelectorAll(".chip")) {
    chip.addEventListener("click", () => {
      const on = chip.getAttribute("aria-pressed") !== "true";
      chip.setAttribute("aria-pressed", String(on));
      const set = chosen[chip.dataset.kind];
      if (on) set.add(chip.dataset.value); else set.delete(chip.dataset.value);
      draw();
    });
  }
  document.getElementById("regraft-open").addEventListener("click", () => every(true));
  document.getElementById("regraft-close").addEventListener("click", () => every(false));
  document.getElementById("regraft-theme").addEventListener("click", () => {
    const dark = document.documentElement.dataset.theme
      ? document.documentElement.dataset.theme === "dark"
      : window.matchMedia("(prefers-color-scheme: dark)").matches;
    document.documentElement.dataset.theme = dark ? "light" : "dark";
  });

  // Open level by level while it all stays in view.
  let front = [root];
  let rows = root.kids.length;
  while (front.length) {
    const next = front.flatMap((node) => node.kids);
    const more = next.reduce((sum, node) => sum + node.kids.length, 0);
    if (!more || rows + more > FIRST) break;
    next.forEach((node) => { node.open = true; });
    rows += more;
    front = next;
  }
  document.getElementById("regraft-explorer").hidden = false;
  draw();
})();
