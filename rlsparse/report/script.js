"use strict";
// Tips on marks (pointer, and arrow keys within a focused chart), filter by factor, sorted tables.
// The page can be read without.
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const tip = document.getElementById("tip");
  let current = null;
  let shownAt = null;

  // --- tips ---------------------------------------------------------------------------------
  function hide() {
    if (current) current.classList.remove("current");
    current = null;
    tip.classList.remove("shown");
  }

  function show(mark) {
    if (mark === current) return;
    hide();
    current = mark;
    mark.classList.add("current");
    tip.textContent = mark.dataset.tip;
    tip.classList.add("shown");
    const place = mark.getBoundingClientRect();
    shownAt = place;
    const { width, height } = tip.getBoundingClientRect();
    const middle = place.left + place.width / 2 - width / 2;
    const left = Math.max(4, Math.min(middle, document.documentElement.clientWidth - width - 4));
    const above = place.top - height - 8;
    tip.style.left = `${left}px`;
    tip.style.top = `${above < 4 ? place.bottom + 8 : above}px`;
  }

  const over = (event) => {
    const mark = event.target.closest("[data-tip]");
    if (mark) show(mark);
    else if (!document.activeElement.closest(".chart")) hide();
  };
  document.addEventListener("pointerover", over);
  const moved = () => {
    if (!current) return;
    const { left, top } = current.getBoundingClientRect();
    if (left !== shownAt.left || top !== shownAt.top) hide();
  };
  document.addEventListener("scroll", moved, { passive: true, capture: true });

  // --- arrow keys: a chart is one stop of the tab key, its marks are reached by arrows -------
  const marks = (chart) => all("[data-tip]", chart).filter((mark) => mark.getClientRects().length);
  document.addEventListener("focusout", hide);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") return hide();
    const chart = document.activeElement.closest(".chart");
    if (!chart || chart !== document.activeElement) return undefined;
    const found = marks(chart);
    const at = found.indexOf(current);
    const next = {
      ArrowRight: Math.min(at + 1, found.length - 1),
      ArrowLeft: Math.max(at - 1, 0),
      Home: 0,
      End: found.length - 1,
    }[event.key];
    if (next === undefined || !found.length) return undefined;
    event.preventDefault();
    found[next].scrollIntoView({ block: "nearest", inline: "nearest" });
    return show(found[next]);
  });

  // --- filter -------------------------------------------------------------------------------
  const form = document.getElementById("filter");
  if (form) {
    const groups = JSON.parse(document.getElementById("groups").textContent);
    const boxes = all("input", form);
    const places = (text) => text.split(" ").filter(Boolean).map(Number);
    const several = all("[data-c]").map((one) => [one, places(one.dataset.c)]);
    const some = all("[data-some]").map((one) => [one, places(one.dataset.some)]);
    const filter = () => {
      const off = boxes.filter((box) => !box.checked);
      const hidden = groups.map((group) =>
        off.some((box) => group[box.dataset.path] === box.value));
      for (const [one, own] of several) one.classList.toggle("off", own.some((i) => hidden[i]));
      for (const [one, own] of some) one.classList.toggle("off", own.length > 0 && own.every((i) => hidden[i]));
      const left = hidden.filter((value) => !value).length;
      form.querySelector("output").textContent = off.length
        ? `${left} of ${groups.length} cells shown; numbers over several cells stay as they are`
        : "";
    };
    form.hidden = false;
    form.addEventListener("change", filter);
    form.addEventListener("reset", () => requestAnimationFrame(filter));
    filter(); // a browser may have kept the boxes of an earlier visit
  }

  // --- sorting ------------------------------------------------------------------------------
  const key = (row, column) => {
    const cell = row.children[column];
    if (!("v" in cell.dataset)) return cell.textContent.trim();
    return cell.dataset.v === "" ? NaN : Number(cell.dataset.v);
  };
  const compare = (a, b) => {
    if (typeof a === "string") return a.localeCompare(b, "en", { numeric: true });
    return a - b;
  };
  function sort(table, heads, column) {
    const head = heads[column];
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const one of heads) one.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const body = table.tBodies[0];
    const rows = [...body.rows].map((row) => [key(row, column), row]);
    rows.sort(([a], [b]) => {
      if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b);
      return down ? compare(b, a) : compare(a, b);
    });
    body.append(...rows.map(([, row]) => row));
  }
  for (const table of all("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      if ("plain" in head.dataset) return;
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      button.addEventListener("click", () => sort(table, heads, column));
      head.append(button);
    });
  }

  // --- printing -----------------------------------------------------------------------------
  window.addEventListener("beforeprint", () => all("details").forEach((one) => (one.open = true)));
})();
