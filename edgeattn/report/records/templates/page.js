// The page itself: theme, tables, filter, which record is looked at, and when a chart is drawn.
const find = (selector, root = document) => [...root.querySelectorAll(selector)];
const stored = (id) => JSON.parse(document.getElementById(id).textContent);
const root = document.documentElement;
const pick = document.getElementById("pick");
const themeButton = document.getElementById("theme");
const systemDark = matchMedia("(prefers-color-scheme: dark)");

const state = { all: stored("data").records, shown: [], one: null };
state.all.forEach((record, i) => { record.n = i + 1; });
state.shown = state.all;

// A chart is drawn when it comes near the screen: a page of 200 records opens at once.
const watcher = new IntersectionObserver(
  (entries) => entries.filter((entry) => entry.isIntersecting).forEach((entry) => draw(entry.target)),
  { rootMargin: "400px 0px" });

// Plotly takes a second to start on a phone: the tables are there before it.
function startPlotly() {
  if (window.Plotly) return;
  const script = document.createElement("script");
  script.textContent = document.getElementById("plotly").textContent;
  document.head.append(script);
}

function draw(place) {
  watcher.unobserve(place);
  startPlotly();
  const choice = place.closest("section").querySelector(".choice");
  const figure = charts[place.dataset.chart](state, choice ? choice.value : "");
  const none = place.nextElementSibling;
  place.dataset.drawn = figure ? "yes" : "none";
  place.hidden = !figure;
  none.hidden = Boolean(figure);
  if (!figure) {
    none.textContent = "There is nothing of this here.";
    return;
  }
  const layout = themed(figure.layout);
  place.style.minHeight = `${layout.height}px`;
  Plotly.react(place, figure.traces, layout, CONFIG);
}

function later(place) {
  place.hidden = false;
  place.nextElementSibling.hidden = true;
  delete place.dataset.drawn;
  watcher.unobserve(place);
  watcher.observe(place);
}

function redraw() {
  find(".chart").filter((place) => place.dataset.drawn === "yes").forEach(draw);
}

// Theme: the system's until the button is used.
const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : systemDark.matches);
function nameTheme() {
  themeButton.textContent = isDark() ? "light" : "dark";
  themeButton.setAttribute("aria-label", `switch to ${themeButton.textContent} colours`);
}
themeButton.addEventListener("click", () => {
  root.dataset.theme = isDark() ? "light" : "dark";
  nameTheme();
  redraw();
});
systemDark.addEventListener("change", () => { nameTheme(); redraw(); });
matchMedia("(max-width: 640px)").addEventListener("change", redraw);
window.addEventListener("beforeprint", () => find(".chart:not([data-drawn])").forEach(draw));

// Tables: a click on a heading sorts; what has no value stays last.
function key(cell) {
  const text = cell.dataset.sort;
  if (text === undefined || text === "") return null;
  const figure = Number(text);
  return Number.isNaN(figure) ? text : figure;
}
function compare(a, b) {
  if (typeof a === "number" && typeof b === "number") return a - b;
  return String(a).localeCompare(String(b), undefined, { numeric: true });
}
function sort(heading) {
  const up = heading.getAttribute("aria-sort") !== "ascending";
  const body = heading.closest("table").tBodies[0];
  const column = heading.cellIndex;
  find("th", heading.parentElement).forEach((other) => other.setAttribute("aria-sort", "none"));
  heading.setAttribute("aria-sort", up ? "ascending" : "descending");
  const rows = [...body.rows].map((row) => [key(row.cells[column]), row]);
  rows.sort(([a], [b]) => {
    if (a === null || b === null) return (a === null) - (b === null);
    return up ? compare(a, b) : compare(b, a);
  });
  body.append(...rows.map(([, row]) => row));
}
document.addEventListener("click", (event) => {
  const heading = event.target.closest("table.sortable th");
  if (heading) sort(heading);
});

// A table from data: everything is set as text, nothing as HTML.
function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}
function build(table) {
  const box = element("div", undefined, "wide");
  box.tabIndex = 0;
  box.setAttribute("role", "region");
  box.setAttribute("aria-label", table.label);
  const made = element("table", undefined, "sortable");
  const head = made.createTHead().insertRow();
  for (const [name, unit, figure] of table.columns) {
    const heading = element("th", undefined, figure ? "figure" : "");
    const button = element("button", name);
    button.type = "button";
    heading.scope = "col";
    heading.setAttribute("aria-sort", "none");
    if (unit) button.append(" ", element("small", unit));
    heading.append(button);
    head.append(heading);
  }
  const body = made.createTBody();
  for (const cells of table.rows) {
    const row = body.insertRow();
    cells.forEach(([text, value], i) => {
      const cell = element("td", text, table.columns[i][2] ? "figure" : "");
      cell.title = text;
      if (value !== null) cell.dataset.sort = value;
      row.append(cell);
    });
  }
  box.append(made);
  return box;
}

// The filter looks at all words of a record; charts of all records follow it.
const filter = document.getElementById("filter");
function applyFilter() {
  const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
  const matches = (text) => words.every((word) => text.includes(word));
  find("tr[data-searched]").forEach((row) => { row.hidden = !matches(row.dataset.searched); });
  state.shown = state.all.filter((record) => matches(record.searched));
  find("section:not(.one) .chart").forEach(later);
}
if (filter) {
  let waiting;
  filter.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(applyFilter, 150); });
}

function show(index) {
  state.one = stored(`detail-${index}`);
  const { fields, rows } = state.one.operations || { fields: [], rows: [] };
  state.one.operations = rows.map((row) => Object.fromEntries(fields.map((field, i) => [field, row[i]])));
  if (root.dataset.ready) find(".one .chart").forEach(later);
  find(".made").forEach((place) => {
    const table = tables[place.dataset.table](state.one);
    place.replaceChildren(table ? build(table) : element("p", "There is nothing of this here.", "none"));
  });
  find("[data-words]").forEach((place) => { place.textContent = state.one[place.dataset.words] || ""; });
}
if (pick) pick.addEventListener("change", () => show(pick.value));
find(".choice").forEach((choice) =>
  choice.addEventListener("change", () => find(".chart", choice.closest("section")).forEach(later)));

nameTheme();
if (pick) show(pick.value);
root.dataset.ready = Math.round(performance.now()); // ms until the tables can be used
const begin = () => setTimeout(() => find(".chart").forEach(later), 30); // after the first picture of the page
if (document.readyState === "complete") begin();
else window.addEventListener("load", begin);
