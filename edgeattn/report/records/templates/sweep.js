// Cells that held: an error against a cost, less of both is better. Which of them nothing beats comes with the data.
"use strict";

function fronts(state, choice) {
  const plane = choice || stored("data").planes[0];
  const { x: xs, y: ys, x_title: xTitle, y_title: yTitle, logarithmic } = plane && stored("data").axes[plane];
  const records = state.shown.filter((r) => known(r[xs]) && known(r[ys]));
  if (!records.length) return null;
  // An error of nothing has no place on a logarithmic axis: it is drawn at the bottom.
  const positive = records.map((r) => r[ys]).filter((value) => value > 0);
  const floor = positive.length ? Math.min(...positive) / 5 : 1e-12;
  const y = (record) => (logarithmic ? Math.max(record[ys], floor) : record[ys]);
  const traces = [];
  const groupOf = (record) => record.groups[plane];
  const names = [...new Set(state.all.map(groupOf))];
  names.forEach((name, i) => {
    const own = records.filter((record) => groupOf(record) === name);
    if (!own.length) return;
    const color = colour(i);
    const best = own.filter((record) => record.fronts.includes(plane)).sort((a, b) => a[xs] - b[xs]);
    const labelled = new Set();
    if (records.length <= 60 && !narrow()) {
      const places = new Set();
      for (const record of best) {
        const place = `${record[xs]} ${record[ys]}`;
        if (!places.has(place)) labelled.add(record);
        places.add(place);
      }
    }
    traces.push({
      type: "scatter", mode: "lines", x: best.map((r) => r[xs]), y: best.map(y), legendgroup: esc(name), showlegend: false,
      line: { color, width: 1.5, dash: "dot", shape: "hv" }, hoverinfo: "skip",
    }, {
      type: "scatter", mode: "markers+text", name: esc(cut(name, narrow() ? 36 : 60)), legendgroup: esc(name), x: own.map((r) => r[xs]), y: own.map(y),
      text: own.map((r) => (labelled.has(r) ? esc(cut(r.short, 30)) : "")), textposition: "top center", textfont: { size: 11, color: css("--dim") },
      cliponaxis: false, hoverinfo: "text",
      marker: { color, size: 10, opacity: 0.85, symbol: own.map((r) => (r.fronts.includes(plane) ? "circle" : "circle-open")), line: { width: 1.5, color } },
      hovertext: own.map((r) => `${r.n} · ${esc(r.name)}<br>${esc(yTitle)}: ${esc(r.words[ys])}<br>${esc(xTitle)}: ${esc(r.words[xs])}${r.fronts.includes(plane) ? "<br>on the front" : ""}`),
    });
  });
  const shown = records.map(y);
  const pad = Math.max((Math.max(...shown) - Math.min(...shown)) * 0.18, 0.1);
  const yAxis = logarithmic ? logAxis(shown, `${yTitle}, logarithmic`) : { title: { text: esc(yTitle) }, range: [Math.min(...shown) - pad, Math.max(...shown) + pad] };
  const xAxis = logAxis(records.map((r) => r[xs]), `${xTitle}, logarithmic`);
  for (const axis of logarithmic ? [xAxis, yAxis] : [xAxis]) axis.range = [axis.range[0] - 0.12, axis.range[1] + 0.12];
  return {
    traces, layout: { height: narrow() ? 400 : 480, showlegend: true, margin: { l: 10, r: 16, t: 30 + 18 * (narrow() ? traces.length / 2 : 1), b: 44 }, xaxis: xAxis, yaxis: yAxis },
  };
}

Object.assign(charts, { fronts });
