// Charts: each takes the page's state and the value of its select, and gives traces and a layout, or null.
// Plotly reads a little HTML in every text, so all names pass through esc.
"use strict";

const CONFIG = {
  displaylogo: false, responsive: true, typesetMath: false, scrollZoom: false, showLink: false,
  modeBarButtons: [["toImage", "resetScale2d"]],
};
const ROWS = 40; // more than that in one chart nobody can read
const MODULES = 25;

const esc = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const narrow = () => window.innerWidth <= 640;
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const colour = (i) => css(`--c${i % 8}`);
const known = (value) => value !== null && value !== undefined;
const digits = (value) => (Math.abs(value) >= 100 ? Math.round(value).toLocaleString("en") : Number(value.toPrecision(3)));

// Both ends of a long name matter: the model in front, the layer or the precision at the end.
function cut(text, most) {
  const chars = [...text];
  if (chars.length <= most) return text;
  const front = Math.ceil((most - 1) * 0.4);
  return `${chars.slice(0, front).join("")}…${chars.slice(chars.length - (most - 1 - front)).join("")}`;
}
const tick = (text) => esc(cut(text, narrow() ? 17 : 64));
// Of a module's path the end says most.
function moduleTick(text) {
  const chars = [...text];
  const most = narrow() ? 20 : 64;
  return esc(chars.length > most ? `…${chars.slice(1 - most).join("")}` : text);
}
// On a phone there is room for what a record is, not for how it was run: the number leads to the table.
const rowName = (record) => tick(`${record.n} · ${narrow() ? record.short : record.name}`);

function themed(layout) {
  const axis = (given) => ({
    gridcolor: css("--line"), zerolinecolor: css("--line"), linecolor: css("--line"), tickcolor: css("--line"),
    tickfont: { size: narrow() ? 10 : 12, color: css("--dim") }, automargin: true, fixedrange: narrow(), ...given,
    title: { font: { size: 12, color: css("--dim") }, standoff: 10, text: "", ...(given && given.title) },
  });
  const made = {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", height: 380,
    font: { family: "system-ui, sans-serif", size: 12, color: css("--ink") },
    margin: { l: 10, r: 16, t: 18, b: 44 }, dragmode: narrow() ? false : "zoom", hovermode: "closest",
    hoverlabel: { bgcolor: css("--panel"), bordercolor: css("--line"), font: { color: css("--ink"), size: 12 }, align: "left" },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: css("--dim"), activecolor: css("--ink") },
    legend: { orientation: "h", x: 0, y: 1, yanchor: "bottom", font: { size: 12 } },
    ...layout,
  };
  for (const name of Object.keys(made)) if (/^[xy]axis\d*$/.test(name)) made[name] = axis(made[name]);
  return made;
}

// Rows from the top, at whole numbers: names that are cut alike stay apart.
const rows = (labels) => ({
  tickvals: labels.map((_, i) => i), ticktext: labels, range: [labels.length - 0.5, -0.5],
  fixedrange: true, showgrid: false, zeroline: false, ticks: "",
});
const rowsHeight = (labels, each = 27) => 100 + each * Math.max(labels.length, 2);

// Ticks at 1, 2 and 5 while there is room, else at powers of ten, and those written out.
function logAxis(values, title) {
  const found = values.filter((value) => value > 0);
  const low = Math.log10(Math.min(...found)) - 0.12;
  const high = Math.log10(Math.max(...found)) + 0.12;
  const steps = high - low < (narrow() ? 1.2 : 3) ? [1, 2, 5] : [1];
  const every = Math.max(1, Math.ceil((high - low) / (narrow() ? 5 : 9)));
  const tickvals = [];
  for (let power = Math.floor(low); power <= Math.ceil(high); power += 1) {
    if (power % every === 0) for (const step of steps) tickvals.push(step * 10 ** power);
  }
  const write = (value) => (value >= 1e6 || value < 1e-4 ? value.toExponential(0).replace("e+", "e") : String(Number(value.toPrecision(3))));
  return { type: "log", tickvals, ticktext: tickvals.map(write), range: [low, high], title: { text: title } };
}
const spread = (values) => {
  const found = values.filter((value) => value > 0);
  return found.length ? Math.max(...found) / Math.min(...found) : 1;
};
// Logarithmic where the slowest would press all others against the axis.
const msAxis = (values, title) => (spread(values) > 12
  ? logAxis(values, `${title}, logarithmic`) : { title: { text: title }, rangemode: "tozero" });

function groupColours(records) {
  const names = [...new Set(records.map((record) => record.group))];
  return new Map(names.map((name, i) => [name, colour(i)]));
}
const cutRows = (records) => records.slice(0, ROWS);

function distribution(series, choice, title) {
  if (choice === "ecdf") {
    const traces = series.map(({ name, label, values, color }, i) => ({
      type: "scatter", mode: "lines", name: label || tick(name), x: values, y: values.map((_, k) => ((k + 1) / values.length) * 100),
      line: { shape: "hv", width: 2, color, dash: ["solid", "dash", "dot", "dashdot"][Math.floor(i / 8) % 4] },
      hoverinfo: "text", hovertext: values.map((value, k) => `${esc(name)}<br>${digits((100 * (k + 1)) / values.length)} % within ${digits(value)} ms`),
    }));
    const legend = { orientation: "h", x: 0, y: -0.22, yanchor: "top", font: { size: narrow() ? 10 : 12 } };
    const lines = Math.ceil(series.length / (narrow() ? 1 : 3));
    return {
      traces, layout: { height: 400 + 20 * lines, legend, margin: { l: 10, r: 16, t: 30, b: 70 + 20 * lines },
        xaxis: msAxis(series.flatMap((one) => one.values), title), yaxis: { title: { text: "% of runs" }, range: [0, 101] } },
    };
  }
  const traces = series.map(({ name, values, color }, i) => ({
    type: "violin", orientation: "h", x: values, y0: i, name: esc(name), line: { color, width: 1.2 }, fillcolor: `${color}55`,
    box: { visible: true, width: 0.25 }, meanline: { visible: false }, points: false, spanmode: "hard", width: 0.86,
    hoverinfo: "x", hoveron: "violins", showlegend: false,
  }));
  const labels = series.map(({ name, label }) => label || tick(name));
  return {
    traces, layout: { height: rowsHeight(labels, 36), yaxis: rows(labels), xaxis: msAxis(series.flatMap((one) => one.values), title) },
  };
}

function latency(state, choice) {
  const records = cutRows(state.shown.filter((record) => record.values.length));
  if (!records.length) return null;
  const colours = groupColours(state.all);
  const series = records.map((record, i) => ({
    name: `${record.n} · ${record.name}`, label: rowName(record), values: record.values, color: choice === "ecdf" ? colour(i) : colours.get(record.group),
  }));
  return distribution(series, choice, "latency, ms");
}

// What was measured again and again, as a line each.
function time(state) {
  const lines = new Map();
  for (const record of state.shown) {
    if (record.estimated || !known(record.p50)) continue;
    if (!lines.has(record.series)) lines.set(record.series, []);
    lines.get(record.series).push(record);
  }
  const found = [...lines].filter(([, records]) => records.length > 1).slice(0, ROWS);
  if (!found.length) return null;
  const traces = found.map(([name, records], i) => {
    const sorted = [...records].sort((a, b) => (a.created < b.created ? -1 : 1));
    return {
      type: "scatter", mode: "lines+markers", name: tick(name), x: sorted.map((r) => r.created), y: sorted.map((r) => r.p50),
      error_y: { type: "data", symmetric: false, array: sorted.map((r) => r.high - r.p50), arrayminus: sorted.map((r) => r.p50 - r.low), thickness: 1.2, width: 3 },
      line: { color: colour(i), width: 1.5 }, marker: { color: colour(i), size: 7 }, hoverinfo: "text",
      hovertext: sorted.map((r) => `${esc(name)}<br>${digits(r.p50)} ms (${digits(r.low)} to ${digits(r.high)})<br>${esc(r.created.slice(0, 19).replace("T", " "))}${r.commit ? `, commit ${esc(r.commit)}` : ""}, EdgeAttn ${esc(r.version)}`),
    };
  });
  const legend = { orientation: "h", x: 0, y: -0.2, yanchor: "top", font: { size: narrow() ? 10 : 12 } };
  const high = found.length * (narrow() ? 22 : 20);
  const values = found.flatMap(([, records]) => records.map((r) => r.p50));
  return {
    traces, layout: { height: 380 + high, legend, showlegend: true, margin: { l: 10, r: 16, t: 18, b: 60 + high },
      xaxis: { type: "date" }, yaxis: msAxis(values, "p50, ms") },
  };
}

// The best of a device: nothing is faster and at least as good.
function front(points, lower) {
  const better = (a, b) => (lower ? a < b : a > b);
  const found = [];
  for (const point of [...points].sort((a, b) => a.p50 - b.p50 || (lower ? 1 : -1) * (a.accuracy - b.accuracy))) {
    if (!found.length || better(point.accuracy, found[found.length - 1].accuracy)) found.push(point);
  }
  return found;
}

function pareto(state, choice) {
  const metric = choice || (stored("data").metrics[0] || [])[0];
  const records = state.shown.filter((r) => r.metric === metric && known(r.accuracy) && r.p50 > 0);
  if (!records.length) return null;
  const lower = stored("data").metrics.some(([name, less]) => name === metric && less);
  const percent = !lower && records.every((r) => r.accuracy >= 0 && r.accuracy <= 1);
  const y = (record) => (percent ? record.accuracy * 100 : record.accuracy);
  const biggest = Math.max(...records.map((r) => r.size), 1e-9);
  const traces = [];
  for (const [name, color] of groupColours(state.all)) {
    const own = records.filter((record) => record.group === name);
    if (!own.length) continue;
    const best = front(own, lower);
    const labelled = new Set(records.length <= 60 && !narrow() ? best : []);
    traces.push({
      type: "scatter", mode: "lines", x: best.map((r) => r.p50), y: best.map(y), legendgroup: esc(name), showlegend: false,
      line: { color, width: 1.5, dash: "dot", shape: lower ? "hv" : "hv" }, hoverinfo: "skip",
    }, {
      type: "scatter", mode: "markers+text", name: esc(cut(name, narrow() ? 36 : 60)), legendgroup: esc(name),
      x: own.map((r) => r.p50), y: own.map(y), text: own.map((r) => (labelled.has(r) ? esc(cut(r.short, 30)) : "")),
      textposition: "top center", textfont: { size: 11, color: css("--dim") }, cliponaxis: false,
      marker: {
        color, opacity: 0.75, size: own.map((r) => r.size), sizemode: "area", sizemin: 4, sizeref: (2 * biggest) / 34 ** 2,
        symbol: own.map((r) => (r.estimated ? "circle-open" : "circle")), line: { width: 1.5, color },
      },
      hoverinfo: "text",
      hovertext: own.map((r) => `${r.n} · ${esc(r.name)}<br>${esc(r.score)}, ${digits(r.p50)} ms, ${digits(r.size)} MB${r.estimated ? "<br>uncalibrated estimate" : ""}`),
    });
  }
  const values = records.map((r) => r.p50);
  const ys = records.map(y);
  const pad = Math.max((Math.max(...ys) - Math.min(...ys)) * 0.18, Math.abs(ys[0]) * 1e-3, 1e-6);
  const axis = logAxis(values, "median latency, ms, logarithmic");
  axis.range = [axis.range[0] - 0.1, axis.range[1] + 0.1];
  return {
    traces, layout: { height: narrow() ? 400 : 480, margin: { l: 10, r: 16, t: 30 + 18 * (narrow() ? traces.length / 2 : 1), b: 44 }, xaxis: axis,
      yaxis: { title: { text: esc(cut(metric, 40)) + (percent ? ", %" : "") }, range: [Math.min(...ys) - pad, Math.max(...ys) + pad] } },
  };
}

function bars(records, parts, title) {
  const traces = parts.map(({ name, value, color, words }) => ({
    type: "bar", orientation: "h", name: esc(name), y: records.map((_, i) => i), x: records.map(value), marker: { color },
    hoverinfo: "text", hovertext: records.map((r) => `${r.n} · ${esc(r.name)}<br>${esc(name)}: ${words(r)}`), textposition: "none",
  }));
  const labels = records.map(rowName);
  return { traces, layout: { height: rowsHeight(labels), barmode: "stack", bargap: 0.35, yaxis: rows(labels), xaxis: { title: { text: title } } } };
}

function memory(state) {
  const records = cutRows(state.shown.filter((r) => known(r.peak) || known(r.device_mb)));
  if (!records.length) return null;
  const parts = [{ name: "process, resident", value: (r) => r.peak, color: colour(0), words: (r) => (known(r.peak) ? `${digits(r.peak)} MB` : "not known") }];
  if (records.some((r) => known(r.device_mb))) {
    parts.push({ name: "device's own", value: (r) => r.device_mb, color: colour(1), words: (r) => (known(r.device_mb) ? `${digits(r.device_mb)} MB` : "none") });
  }
  const found = bars(records, parts, "peak, MB");
  found.layout.barmode = "group";
  return found;
}

function times(state) {
  const kinds = [["median run", "p50", "circle"], ["first run", "first", "diamond"], ["load", "load", "square"], ["very first load", "load_first", "square-open"]];
  const records = cutRows(state.shown.filter((r) => known(r.load) || known(r.first)));
  if (!records.length) return null;
  const traces = kinds.filter(([, field]) => records.some((r) => known(r[field]))).map(([name, field, symbol], i) => ({
    type: "scatter", mode: "markers", name, x: records.map((r) => r[field]), y: records.map((_, k) => k),
    marker: { color: colour(i), symbol, size: 10, line: { width: 1.5, color: colour(i) } }, hoverinfo: "text",
    hovertext: records.map((r) => `${r.n} · ${esc(r.name)}<br>${name}: ${known(r[field]) ? digits(r[field]) : "–"} ms`),
  }));
  const labels = records.map(rowName);
  const axis = logAxis(traces.flatMap((trace) => trace.x.filter(known)), "ms, logarithmic");
  return { traces, layout: { height: rowsHeight(labels), yaxis: { ...rows(labels), showgrid: true }, xaxis: axis } };
}

function fallback(state) {
  const records = cutRows(state.shown.filter((r) => Object.keys(r.fallback).length));
  if (!records.length) return null;
  const units = [...new Set(records.flatMap((r) => Object.keys(r.fallback)))];
  const share = (r, unit) => { const own = r.fallback[unit]; return own ? (known(own.time) ? own.time : own.ops) : null; };
  const words = (r, unit) => {
    const own = r.fallback[unit] || {};
    return [known(own.time) ? `${digits(own.time)} % of time` : "", known(own.ops) ? `${digits(own.ops)} % of operations` : "",
      r.wanted ? `asked for: ${esc(r.wanted)}` : ""].filter(Boolean).join(", ");
  };
  const parts = units.map((unit, i) => ({ name: `on ${unit || "another unit"}`, value: (r) => share(r, unit), color: colour(i), words: (r) => words(r, unit) }));
  const found = bars(records, parts, narrow() ? "% of time, or of operations" : "% of time, or of operations where no time is known");
  found.layout.showlegend = true; // the unit's name, also of a single one
  return found;
}

// Of pairs: B over A, with the line where both are equal.
function ratios(state) {
  const pairs = cutRows(state.shown.filter((pair) => known(pair.ratio)));
  if (!pairs.length) return null;
  const labels = pairs.map(rowName);
  const words = (pair) => `${pair.n} · ${esc(pair.name)}<br>${digits(pair.ratio)}x${known(pair.low) ? `, ${digits(pair.low)}x to ${digits(pair.high)}x` : ", no interval"}`;
  const traces = [{
    type: "scatter", mode: "markers", x: pairs.map((p) => p.ratio), y: pairs.map((_, i) => i), hoverinfo: "text", hovertext: pairs.map(words),
    marker: { size: 9, color: pairs.map((p) => (p.low > 1 ? colour(1) : p.high < 1 ? colour(0) : colour(7))) },
    error_x: { type: "data", symmetric: false, array: pairs.map((p) => (known(p.high) ? p.high - p.ratio : 0)),
      arrayminus: pairs.map((p) => (known(p.low) ? p.ratio - p.low : 0)), color: css("--dim"), thickness: 1.5, width: 4 },
  }];
  const ends = pairs.flatMap((p) => [p.ratio, p.low, p.high]).filter(known).concat([1]);
  const axis = logAxis(ends, "B / A, logarithmic");
  if (spread(ends) < 2) Object.assign(axis, { type: "linear", tickvals: undefined, ticktext: undefined, range: undefined, title: { text: "B / A" } });
  const shapes = [{ type: "line", xref: "x", yref: "paper", x0: 1, x1: 1, y0: 0, y1: 1, line: { color: css("--ink"), width: 1, dash: "dash" } }];
  return { traces, layout: { height: rowsHeight(labels), shapes, yaxis: { ...rows(labels), showgrid: true }, xaxis: axis } };
}

const charts = { ratios, latency, time, pareto, memory, times, fallback };
