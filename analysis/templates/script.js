"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const value = row => { const cell = row.cells[column], number = parseFloat(cell.dataset.value); return Number.isNaN(number) ? cell.textContent.trim() : number; };
    const missing = x => x === "–" || x === "";
    [...body.rows].sort((a, b) => { const x = value(a), y = value(b);
      if (missing(x) || missing(y)) return missing(x) - missing(y);
      if (typeof x !== typeof y) return typeof x === "number" ? -1 : 1;
      return (typeof x === "number" ? x - y : x.localeCompare(y)) * (up ? 1 : -1); }).forEach(row => body.append(row));
  }));
}

const root = document.documentElement, toggle = document.querySelector("button.theme");
if (toggle) {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const now = () => root.dataset.theme || (dark.matches ? "dark" : "light");
  const tell = () => { toggle.textContent = now() === "dark" ? "Light" : "Dark"; toggle.setAttribute("aria-label", "Show the page in " + toggle.textContent.toLowerCase() + " colours"); };
  toggle.hidden = false;
  toggle.addEventListener("click", () => { root.dataset.theme = now() === "dark" ? "light" : "dark"; tell(); });
  dark.addEventListener("change", tell);
  tell();
}

const folded = document.querySelector("nav.contents details"), wide = matchMedia("(min-width: 1120px)");
if (folded) {
  const fit = () => { folded.open = wide.matches; };
  wide.addEventListener("change", fit);
  fit();
  const links = new Map([...folded.querySelectorAll("a")].map(link => [link.hash.slice(1), link]));
  const seen = new Set();
  const watch = new IntersectionObserver(entries => {
    for (const entry of entries) entry.isIntersecting ? seen.add(entry.target.id) : seen.delete(entry.target.id);
    const first = [...links.keys()].find(id => seen.has(id));
    if (first) for (const [id, link] of links) id === first ? link.setAttribute("aria-current", "true") : link.removeAttribute("aria-current");
  }, { rootMargin: "-10% 0px -55% 0px" });
  for (const id of links.keys()) { const target = document.getElementById(id); if (target) watch.observe(target); }
}

let opened = [];
addEventListener("beforeprint", () => { opened = [...document.querySelectorAll("main details:not([open], .long)")]; opened.forEach(each => { each.open = true; }); });
addEventListener("afterprint", () => { opened.forEach(each => { each.open = false; }); });

for (const figure of document.querySelectorAll("figure:has(> .map-data)")) {
  const data = JSON.parse(figure.querySelector(".map-data").textContent), map = figure.querySelector(".map"), tip = figure.querySelector(".tip");
  const drawings = [...map.querySelectorAll("svg")];
  const hide = () => { tip.style.visibility = "hidden"; drawings.forEach(each => { each.querySelector(".ring").style.visibility = "hidden"; }); };
  const chosen = () => figure.querySelector('.legend button[aria-pressed="true"]');
  drawings.forEach((drawing, place) => {
    const points = data.panels[place];
    drawing.addEventListener("pointermove", event => {
      const box = drawing.getBoundingClientRect(), scale = 1000 / box.width;
      const x = (event.clientX - box.left) * scale, y = (event.clientY - box.top) * scale, only = chosen();
      let best = -1, least = 26 * 26;
      for (let i = 0; i < points.x.length; i++) {
        if (only && data.labels[points.l[i]] !== only.dataset.label) continue;
        const far = (points.x[i] - x) ** 2 + (points.y[i] - y) ** 2;
        if (far < least) { least = far; best = i; }
      }
      if (best < 0) return hide();
      drawings.forEach((other, number) => { const ring = other.querySelector(".ring"), at = data.panels[number];
        ring.setAttribute("cx", at.x[best]); ring.setAttribute("cy", at.y[best]); ring.style.visibility = "visible"; });
      tip.textContent = data.labels[points.l[best]] + " · " + points.s[best] + (points.id.length ? " · " + points.id[best] : "");
      const frame = map.getBoundingClientRect(), left = event.clientX - frame.left;
      tip.style.visibility = "visible";
      tip.style.left = Math.min(left + 14, Math.max(0, frame.width - tip.offsetWidth - 4)) + "px";
      tip.style.top = event.clientY - frame.top + 16 + "px";
    });
    drawing.addEventListener("pointerleave", hide);
  });
  for (const button of figure.querySelectorAll(".legend button")) button.addEventListener("click", () => {
    const on = button.getAttribute("aria-pressed") !== "true";
    figure.querySelectorAll(".legend button").forEach(each => each.setAttribute("aria-pressed", "false"));
    button.setAttribute("aria-pressed", String(on));
    map.classList.toggle("chosen", on);
    map.querySelectorAll("path").forEach(path => path.classList.toggle("on", on && path.dataset.label === button.dataset.label));
  });
}
