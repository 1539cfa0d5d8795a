// What the page does: the table's order and filter, the pictures, and what is drawn when (charts.js).
"use strict";

const byId = (id) => document.getElementById(id);
const data = JSON.parse(byId("data").textContent);
const DASHES = ["", "7 3", "2 3", "9 3 2 3"];
const rows = data.rows.map((row, i) => ({
  ...row,
  body: byId(row.id),
  colour: `var(--c${i % 10})`,
  dash: DASHES[Math.floor(i / 10) % DASHES.length],
}));
const visible = () => rows.filter((row) => !row.body.hidden);
const drawn = () => visible().filter((row) => row.body.querySelector(".draw").checked);
const written = (x) => (x !== 0 && (Math.abs(x) < 1e-3 || Math.abs(x) >= 1e6) ? x.toExponential(2) : String(+x.toPrecision(4)));

function element(name, content = [], properties = {}) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...[content].flat());
  return made;
}

function missing(text) {
  return element("p", text, { className: "missing" });
}

// -- table

const table = byId("table");

function sortBy(head) {
  const first = head.dataset.first ?? "ascending";
  const other = first === "ascending" ? "descending" : "ascending";
  const order = head.getAttribute("aria-sort") === first ? other : first;
  for (const th of table.tHead.rows[0].cells) th.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", order);
  const sign = order === "ascending" ? 1 : -1;
  const value = (body) => body.rows[0].cells[head.cellIndex].dataset.value;
  const compare = (a, b) => {
    if (a === "" || b === "") return (a === "") - (b === ""); // what is missing comes last, either way
    const difference = a - b;
    return sign * (Number.isNaN(difference) ? a.localeCompare(b, "en", { numeric: true }) : difference);
  };
  table.append(...[...table.tBodies].sort((a, b) => compare(value(a), value(b))));
}

function filter() {
  const words = byId("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  for (const { body } of rows) {
    const text = body.textContent.toLowerCase();
    body.hidden = !words.every((word) => text.includes(word));
  }
  byId("count").value = `${visible().length} of ${rows.length} rows`;
  draw();
}

function expand(button) {
  const open = button.getAttribute("aria-expanded") !== "true";
  button.setAttribute("aria-expanded", open);
  for (const row of button.closest("tbody").querySelectorAll(".run")) row.hidden = !open;
}

// -- pictures

const viewer = byId("viewer");
const pictures = [...document.querySelectorAll(".picture img")];
let viewed = 0;

function view(index) {
  viewed = (index + pictures.length) % pictures.length;
  const { src, alt } = pictures[viewed];
  Object.assign(viewer.querySelector("img"), { src, alt });
  viewer.querySelector("figcaption").textContent = alt;
  if (!viewer.open) viewer.showModal();
}

// -- events

for (const button of table.tHead.querySelectorAll("button"))
  button.addEventListener("click", () => sortBy(button.closest("th")));
for (const button of table.querySelectorAll(".expand")) button.addEventListener("click", () => expand(button));
byId("all").addEventListener("change", ({ target }) => {
  for (const { body } of visible()) body.querySelector(".draw").checked = target.checked;
  draw();
});
for (const box of table.querySelectorAll(".draw")) box.addEventListener("change", draw);
byId("filter").addEventListener("input", filter);
byId("quality").append(...data.results.map((result) => new Option(result.title)));
// At first what most rows have; of those not a loss, which is there for the optimizer, but a score.
const prominence = ({ key, better }) => d3.sum(rows, (row) => key in row.values) + (better === "up") / 2;
byId("quality").selectedIndex = d3.greatestIndex(data.results, prominence);
byId("quality").addEventListener("change", drawFronts);
byId("metric").append(...Object.keys(data.curves).map((name) => new Option(name)));
for (const id of ["metric", "smooth", "log"]) byId(id).addEventListener("change", drawCurves);
byId("own").addEventListener("change", drawChanges);
pictures.forEach((picture, i) => picture.parentElement.addEventListener("click", () => view(i)));
viewer.addEventListener("click", (event) => event.target.tagName !== "IMG" && viewer.close());
viewer.addEventListener("keydown", ({ key }) =>
  ({ ArrowLeft: () => view(viewed - 1), ArrowRight: () => view(viewed + 1) })[key]?.(),
);
addEventListener("hashchange", () => {
  const at = byId(location.hash.slice(1));
  if (at?.tagName === "DETAILS") at.open = true;
});

const dark = matchMedia("(prefers-color-scheme: dark)");
const theme = byId("theme");
const isDark = () => (document.documentElement.style.colorScheme || (dark.matches ? "dark" : "light")) === "dark";
const nameTheme = () => (theme.textContent = isDark() ? "Light" : "Dark");
theme.addEventListener("click", () => {
  document.documentElement.style.colorScheme = isDark() ? "light" : "dark";
  nameTheme();
});
dark.addEventListener("change", nameTheme);
nameTheme();

let width = 0;
new ResizeObserver(([{ contentRect }]) => {
  if (contentRect.width !== width) {
    width = contentRect.width;
    draw();
  }
}).observe(document.querySelector("main"));
