// Charts of one record, or of one pair of records.

// What of an operation is drawn: its time, else its estimate, else its share.
function basis(operations) {
  for (const [field, title] of [["ms", "ms under the profiler"], ["estimate", "ms, uncalibrated estimate"], ["share", "share"]]) {
    if (operations.some((op) => known(op[field]))) return { field, title };
  }
  return null;
}
const place = (op) => op.module || op.name || "(unknown)";

function operations(state, choice) {
  const found = basis(state.one.operations || []);
  if (!found) return null;
  const by = { module: place, operation: (op) => op.name, kind: (op) => op.op || "(unknown)" }[choice || "module"];
  const sums = new Map();
  state.one.operations.forEach((op, i) => {
    const name = by(op);
    const id = choice === "operation" ? `${i} ${name}` : name;
    const own = sums.get(id) || { name, value: 0, estimate: null, units: new Map(), kinds: new Set() };
    own.value += op[found.field] || 0;
    if (known(op.estimate)) own.estimate = (own.estimate || 0) + op.estimate;
    own.units.set(op.unit, (own.units.get(op.unit) || 0) + (op[found.field] || 0));
    own.kinds.add(op.op);
    sums.set(id, own);
  });
  const all = [...sums.values()].sort((a, b) => b.value - a.value);
  const total = all.reduce((sum, one) => sum + one.value, 0) || 1;
  const shown = all.slice(0, MODULES);
  const units = [...new Set(state.one.operations.map((op) => op.unit))].sort();
  const y = shown.map((_, i) => i);
  const traces = units.map((unit, i) => ({
    type: "bar", orientation: "h", name: esc(unit || "unit unknown"), y, x: shown.map((one) => one.units.get(unit) || 0),
    marker: { color: colour(i) }, showlegend: units.length > 1, hoverinfo: "text", textposition: "none",
    hovertext: shown.map((one) => `${esc(one.name)}<br>${digits(one.value)} ${found.title}, ${digits((100 * one.value) / total)} %<br>${esc(cut([...one.kinds].join(", "), 60))}`),
  }));
  if (found.field === "ms" && shown.some((one) => known(one.estimate))) {
    traces.push({
      type: "scatter", mode: "markers", name: "on the device's roofline (uncalibrated estimate)", x: shown.map((one) => one.estimate), y,
      marker: { color: css("--ink"), symbol: "line-ns-open", size: 13, line: { width: 2, color: css("--ink") } }, hoverinfo: "text",
      hovertext: shown.map((one) => `${esc(one.name)}<br>${known(one.estimate) ? digits(one.estimate) : "–"} ms on the roofline`),
    });
  }
  const labels = shown.map((one) => moduleTick(one.name));
  return { traces, layout: { height: rowsHeight(labels, 24), barmode: "stack", bargap: 0.3, yaxis: rows(labels), xaxis: { title: { text: found.title }, rangemode: "tozero" } } };
}

function treemap(state) {
  const found = basis(state.one.operations || []);
  if (!found) return null;
  const nodes = new Map([["", { parent: "", label: state.one.bundle, value: 0, kinds: new Map() }]]);
  const kinds = new Map();
  const add = (sums, name, value) => sums.set(name, (sums.get(name) || 0) + value);
  for (const op of state.one.operations) {
    const value = op[found.field] || 0;
    if (!(value > 0)) continue;
    let parent = "";
    nodes.get("").value += value;
    for (const part of (op.module || "(no module)").split(".")) {
      const id = `${parent}.${part}`;
      // A number says nothing alone: "stages.3", not "3".
      const label = /^\d+$/.test(part) && parent ? `${nodes.get(parent).label}.${part}` : part;
      if (!nodes.has(id)) nodes.set(id, { parent, label, value: 0, kinds: new Map() });
      nodes.get(id).value += value;
      parent = id;
    }
    add(nodes.get(parent).kinds, op.op || "(unknown)", value);
    add(kinds, op.op || "(unknown)", value);
  }
  // A module with a single kind of operation is a box of it; one with several, or with modules inside, has a box of each.
  const inner = new Set([...nodes.values()].map((node) => node.parent));
  for (const [id, node] of [...nodes]) {
    if (node.kinds.size === 1 && !inner.has(id)) [node.kind] = node.kinds.keys();
    else for (const [kind, value] of node.kinds) nodes.set(`/${id}/${kind}`, { parent: id, label: kind, value, kinds: new Map(), kind, of: id });
  }
  const list = [...nodes.entries()];
  const order = [...kinds].sort((a, b) => b[1] - a[1]).map(([kind]) => kind);
  const fill = (node) => (known(node.kind) ? colour(Math.min(order.indexOf(node.kind), 7)) : css("--panel"));
  const words = ([id, node]) => `${esc((node.of === undefined ? id : node.of).slice(1) || node.label)}${known(node.kind) ? ` (${esc(node.kind)})` : ""}`
    + `<br>${digits(node.value)} ${found.title}, ${digits((100 * node.value) / (nodes.get("").value || 1))} %`;
  return {
    traces: [{
      type: "treemap", ids: list.map(([id]) => id || "root"), labels: list.map(([, node]) => esc(cut(node.label, 40))),
      parents: list.map(([id, node]) => (id === "" ? "" : node.parent || "root")), values: list.map(([, node]) => (known(node.kind) ? node.value : 0)),
      branchvalues: "remainder", textinfo: "label", hoverinfo: "text", hovertext: list.map(words), pathbar: { thickness: 22 },
      textfont: { color: list.map(([, node]) => css(known(node.kind) ? "--on" : "--ink")) }, tiling: { pad: 2 },
      marker: { colors: list.map(([, node]) => fill(node)), line: { color: css("--line"), width: 1 }, pad: { t: 20, l: 3, r: 3, b: 3 } },
    }],
    layout: { height: narrow() ? 460 : 560, margin: { l: 0, r: 0, t: 26, b: 0 } },
  };
}

function roofline(state) {
  const ops = (state.one.operations || []).filter((op) => op.macs > 0 && op.bytes > 0);
  const measured = ops.some((op) => op.ms > 0);
  const time = (op) => (measured ? op.ms : op.estimate);
  const points = ops.filter((op) => time(op) > 0).map((op) => ({ op, x: (2 * op.macs) / op.bytes, y: (2 * op.macs) / time(op) / 1e6 }));
  if (!points.length) return null;
  const names = { compute: "bound by arithmetic", memory: "bound by memory", call: "bound by the call", "": "bound unknown" };
  const roof = state.one.roofline;
  const xs = points.map((point) => point.x);
  const traces = [];
  if (roof && roof.gflops > 0 && roof.gb_s > 0) {
    const ridge = roof.gflops / roof.gb_s;
    xs.push(ridge / 2, ridge * 4);
    const ends = [Math.min(...xs) / 2, ridge, Math.max(...xs) * 2].sort((a, b) => a - b);
    traces.push({
      type: "scatter", mode: "lines", name: `roof: ${digits(roof.gflops)} GFLOP/s, ${digits(roof.gb_s)} GB/s${roof.source ? ` (${esc(roof.source)})` : ""}`,
      x: ends, y: ends.map((x) => Math.min(roof.gflops, x * roof.gb_s)), line: { color: css("--ink"), width: 2 }, hoverinfo: "skip",
    });
  }
  Object.keys(names).forEach((bound, i) => {
    const own = points.filter((point) => point.op.bound === bound);
    if (!own.length) return;
    traces.push({
      type: "scatter", mode: "markers", name: names[bound], x: own.map((p) => p.x), y: own.map((p) => p.y),
      marker: { color: colour(i), size: 9, opacity: 0.75, symbol: measured ? "circle" : "circle-open", line: { width: 1, color: colour(i) } }, hoverinfo: "text",
      hovertext: own.map((p) => `${esc(place(p.op))} (${esc(p.op.op)})<br>${digits(p.y)} GFLOP/s at ${digits(p.x)} FLOP/byte${roof && roof.gflops > 0 ? `<br>${digits((100 * p.y) / Math.min(roof.gflops, p.x * roof.gb_s))} % of its roof` : ""}`),
    });
  });
  const ys = points.map((point) => point.y).concat(roof && roof.gflops > 0 ? [roof.gflops] : []);
  const title = measured ? "attained, GFLOP/s" : "GFLOP/s, uncalibrated estimate";
  const xTitle = narrow() ? "FLOP per byte" : "arithmetic intensity, FLOP per byte (two for a multiply-accumulate)";
  return {
    traces, layout: { height: narrow() ? 420 : 460, margin: { l: 10, r: 16, t: narrow() ? 96 : 50, b: 44 }, xaxis: logAxis(xs, xTitle), yaxis: logAxis(ys, title) },
  };
}

function quantized(state) {
  const found = (state.one.quantized || []).filter((item) => item.error > 0).slice(0, ROWS);
  if (!found.length) return null;
  const bits = [...new Set(found.map((item) => item.bits))].sort();
  const traces = bits.map((own, i) => ({
    type: "bar", orientation: "h", name: esc(own ? `${own} bits` : "bits unknown"), showlegend: bits.length > 1, marker: { color: colour(i) },
    y: found.map((_, k) => k), x: found.map((item) => (item.bits === own ? item.error : null)), hoverinfo: "text", textposition: "none",
    hovertext: found.map((item) => `${esc(item.module || "(model)")}<br>relative L2 ${esc(item.text)}`),
  }));
  const labels = found.map((item) => moduleTick(item.module || "(model)"));
  const axis = logAxis(found.map((item) => item.error), narrow() ? "relative L2, logarithmic" : "relative L2 of what the module gives, logarithmic");
  axis.range[0] -= 0.3; // so that the smallest has a bar, too
  return { traces, layout: { height: rowsHeight(labels, 24), barmode: "stack", bargap: 0.3, yaxis: rows(labels), xaxis: axis } };
}

function states(state) {
  const found = state.one.states || [];
  const panels = [["temperature, °C", 1], ["clock, MHz", 2], ["power, W", 4]].filter(([, field]) => found.some((one) => known(one[field])));
  if (!panels.length) return null;
  const height = 1 / panels.length;
  const layout = { height: 60 + 170 * panels.length, showlegend: false, xaxis: { title: { text: "seconds since the measurement began" }, anchor: panels.length > 1 ? `y${panels.length}` : "y" } };
  const traces = [];
  panels.forEach(([title, field], i) => {
    const axis = i ? `y${i + 1}` : "y";
    const own = found.filter((one) => known(one[field]));
    layout[`yaxis${i ? i + 1 : ""}`] = { title: { text: title }, domain: [1 - (i + 1) * height + 0.05, 1 - i * height - 0.03], rangemode: field === 1 ? "normal" : "tozero" };
    traces.push({
      type: "scatter", mode: "lines+markers", x: own.map((one) => one[0]), y: own.map((one) => one[field]), yaxis: axis,
      line: { color: colour(i), width: 2 }, marker: { size: 6 }, hoverinfo: "text",
      hovertext: own.map((one) => `${esc(one[5])}, ${digits(one[0])} s: ${digits(one[field])}`),
    });
    const limit = field === 2 && found.find((one) => known(one[3]));
    if (limit) {
      traces.push({
        type: "scatter", mode: "lines", x: [found[0][0], found[found.length - 1][0]], y: [limit[3], limit[3]], yaxis: axis,
        line: { color: css("--dim"), width: 1, dash: "dash" }, hoverinfo: "text", hovertext: `limit ${limit[3]} MHz`,
      });
    }
  });
  return { traces, layout };
}

function runs(state) {
  const found = (state.one.runs || []).filter((process) => process.length);
  if (!found.length) return null;
  const traces = found.map((process, i) => ({
    type: "scatter", mode: "markers", name: `process ${i + 1}`, x: process.map((_, k) => (100 * (k + 0.5)) / process.length), y: process,
    marker: { color: colour(i), size: 4, opacity: 0.65 }, hoverinfo: "text", hovertext: process.map((ms) => `process ${i + 1}: ${digits(ms)} ms`),
  }));
  return { traces, layout: { height: 340, xaxis: { title: { text: "% of each process's runs, in order" }, range: [0, 100] }, yaxis: { title: { text: "ms" } } } };
}

// Of a pair: A and B over each other.
function overlay(state, choice) {
  const sides = (state.one.sides || []).filter((side) => side.values.length);
  if (!sides.length) return null;
  const series = sides.map((side) => ({
    name: side.name, label: narrow() ? "AB"[side.place] : tick(side.name), values: side.values, color: colour(side.place),
  }));
  if (choice !== "histogram") return distribution(series, choice, "latency, ms");
  const all = series.flatMap((one) => one.values);
  const low = Math.min(...all);
  const high = Math.max(...series.map((one) => one.values[Math.floor((one.values.length - 1) * 0.99)]));
  const size = (high - low) / 60 || low / 60 || 1;
  const traces = series.map((one) => ({
    type: "histogram", name: one.label, x: one.values, histnorm: "percent", opacity: 0.6, marker: { color: one.color },
    xbins: { start: low, end: Math.max(...all) + size, size }, autobinx: false, hoverinfo: "x+y",
  }));
  const pad = size * 2;
  return { traces, layout: { height: 380, barmode: "overlay", margin: { l: 10, r: 16, t: narrow() ? 80 : 50, b: 44 }, xaxis: { title: { text: "latency, ms" }, range: [low - pad, high + pad] }, yaxis: { title: { text: "% of runs" } } } };
}

function changes(state) {
  const found = (state.one.changes || []).filter((item) => item.change !== 0).slice(0, MODULES);
  if (!found.length) return null;
  const labels = found.map((item) => moduleTick(item.module));
  const words = (item) => `${esc(item.module)}<br>${known(item.a) ? digits(item.a) : "–"} → ${known(item.b) ? digits(item.b) : "–"} ms`;
  const part = (name, own, color) => ({
    type: "bar", orientation: "h", name, y: found.map((_, i) => i), x: found.map((item) => (own(item.change) ? item.change : null)),
    marker: { color }, hoverinfo: "text", textposition: "none", hovertext: found.map(words),
  });
  const traces = [part("more time in B", (change) => change > 0, colour(1)), part("less", (change) => change <= 0, colour(0))];
  return { traces, layout: { height: rowsHeight(labels, 24), barmode: "stack", bargap: 0.3, yaxis: rows(labels), xaxis: { title: { text: `B minus A, ${state.one.basis}` } } } };
}

Object.assign(charts, { operations, treemap, roofline, quantized, states, runs, overlay, changes });

const tables = {
  numerics: (one) => one.numerics,
  figures: (one) => one.figures,
  changes: (one) => one.table,
  operations: (one) => {
    const found = basis(one.operations);
    if (!found) return null;
    const figure = (value, factor = 1) => [known(value) ? String(digits(value * factor)) : "–", known(value) ? value : null];
    const text = (value) => [value || "–", value || null];
    const all = [["module", "", (op) => text(op.module)], ["operation", "", (op) => text(op.name)], ["kind", "", (op) => text(op.op)], ["unit", "", (op) => text(op.unit)],
      ["time", "ms", (op) => figure(op.ms), true], ["share", "%", (op) => figure(op.share, 100), true], ["MACs", "10⁶", (op) => figure(op.macs, 1e-6), true],
      ["moved", "MB", (op) => figure(op.bytes, 1e-6), true], ["estimate", "ms", (op) => figure(op.estimate), true], ["bound", "", (op) => text(op.bound)]];
    const shown = [...one.operations].sort((a, b) => (b[found.field] || 0) - (a[found.field] || 0)).slice(0, 100);
    const columns = all.filter(([, , read]) => shown.some((op) => read(op)[1] !== null));
    return { label: "operations", columns: columns.map(([name, unit, , right]) => [name, unit, Boolean(right)]), rows: shown.map((op) => columns.map(([, , read]) => read(op))) };
  },
};
