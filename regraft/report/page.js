// Search, filters and keys for the tree of a page; folding is the browser's own (details).
"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const [search, shown] = [byId("regraft-search"), byId("regraft-shown")];
  const tree = document.querySelector(".tree");
  const sites = [...tree.querySelectorAll(".site")];
  const groups = [...tree.querySelectorAll("details")].reverse(); // the inner ones first
  const pressed = { op: new Set(), status: new Set() };
  const texts = new Map();
  const textOf = (site) => {
    if (!texts.has(site)) {
      const own = [...site.children].filter((child) => child.className !== "below");
      texts.set(site, own.map((child) => child.textContent).join(" ").toLowerCase());
    }
    return texts.get(site);
  };

  const filter = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const fits = (site) =>
      Object.entries(pressed).every(([name, set]) => !set.size || set.has(site.dataset[name])) &&
      words.every((word) => textOf(site).includes(word));
    const kept = new Set(sites.filter(fits));
    for (const node of groups) {
      const inside = [...node.children].find((child) => child.className === "below");
      const below = inside !== undefined && [...inside.children].some((child) => !child.hidden);
      node.hidden = !below && !kept.has(node);
      if (words.length && below) node.open = true;
    }
    const all = sites.length.toLocaleString("en") + (sites.length === 1 ? " site" : " sites");
    const some = kept.size.toLocaleString("en") + " of " + all;
    shown.textContent = kept.size === sites.length ? all : some;
  };

  let soon = 0;
  search.addEventListener("input", () => { clearTimeout(soon); soon = setTimeout(filter, 80); });
  for (const chip of document.querySelectorAll(".chip")) {
    chip.addEventListener("click", () => {
      const on = chip.getAttribute("aria-pressed") !== "true";
      chip.setAttribute("aria-pressed", String(on));
      const [name, value] = Object.entries(chip.dataset)[0];
      pressed[name][on ? "add" : "delete"](value);
      filter();
    });
  }
  const every = (open) => {
    for (const node of groups) node.open = open && node.querySelector(":scope > .below") !== null;
  };
  byId("regraft-open").addEventListener("click", () => every(true));
  byId("regraft-close").addEventListener("click", () => every(false));
  byId("regraft-theme").addEventListener("click", () => {
    const root = document.documentElement;
    const system = window.matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
    root.dataset.theme = (root.dataset.theme || system) === "dark" ? "light" : "dark";
  });

  const rows = () => [...tree.querySelectorAll("summary")].filter((row) => row.checkVisibility());
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const row = event.target.closest("summary");
    const step = (by) => { const all = rows(); return all[all.indexOf(row) + by]; };
    const node = row && row.parentElement;
    const parent = node && node.parentElement.closest("details");
    const goes = {
      ArrowDown: () => (row ? step(1) : event.target === search && rows()[0]),
      ArrowUp: () => row && step(-1),
      Home: () => row && rows()[0],
      End: () => row && rows().at(-1),
      ArrowRight: () => row && (node.open ? step(1) : ((node.open = true), row)),
      ArrowLeft: () => row && (node.open ? ((node.open = false), row) : parent && parent.firstElementChild),
      "/": () => event.target !== search && search,
      Escape: () => event.target === search && ((search.value = ""), filter(), search),
    };
    const target = Object.hasOwn(goes, event.key) && goes[event.key]();
    if (!target) return;
    event.preventDefault();
    target.focus();
  });
})();
