// Line charts by uPlot: colours from the style sheet, one marked round for all of them.

import { el, replace, short, swatch, visible } from "./dom.js";
import { columnsOf, valueAt } from "./series.js";

const drawn = new Set();
const sync = () => window.uPlot.sync("rounds");
let marked = null;

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** A figure with title, note, the values at the marked round, and its chart. `colourOf`: line -> number of a colour. */
export function chart(title, note, lines, colourOf, { height = 190, onRound = null } = {}) {
  const box = el("div", { class: "plot" });
  const values = el("div", { class: "values" });
  const heading = el("figcaption", {}, el("h3", {}, visible(title)), el("small", {}, visible(note)));
  const figure = el("figure", { class: "chart", "data-title": title }, heading, box, values);
  const entry = { figure, box, values, lines, colourOf, plot: null };
  const observer = new ResizeObserver(() => {
    if (!figure.isConnected || box.clientWidth === 0) return;
    if (entry.plot) entry.plot.setSize({ width: box.clientWidth, height });
    else start(entry, height, onRound);
  });
  observer.observe(box);
  entry.observer = observer;
  drawn.add(entry);
  return figure;
}

function start(entry, height, onRound) {
  const { box, lines, colourOf } = entry;
  const series = [{ label: "round" }];
  const bands = [];
  for (const line of lines) {
    const stroke = () => colour(`--c${colourOf(line)}`);
    const only = line.x.length === 1;
    series.push({
      label: line.label,
      stroke,
      width: line.thin ? 0.75 : 2,
      alpha: line.thin ? 0.5 : 1,
      spanGaps: true,
      points: { show: only || (!line.thin && line.x.length < 40), size: only ? 7 : 5, fill: stroke, stroke },
    });
    if (line.low) {
      const edge = { stroke: "transparent", width: 0, points: { show: false }, spanGaps: true, label: "" };
      series.push(edge, { ...edge });
      bands.push({ series: [series.length - 1, series.length - 2], fill: () => `${stroke()}2e` });
    }
  }
  const axis = {
    stroke: () => colour("--dim"),
    grid: { stroke: () => colour("--rule"), width: 1 },
    ticks: { show: false },
    font: "11px system-ui, sans-serif",
  };
  const options = {
    width: box.clientWidth,
    height,
    series,
    bands,
    legend: { show: false },
    scales: { x: { time: false, range: (u, low, high) => (low === high ? [low - 0.5, high + 0.5] : [low, high]) } },
    axes: [
      { ...axis, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000], size: 26, gap: 3 },
      { ...axis, size: 52, gap: 4, values: (u, ticks) => ticks.map((tick) => (tick === null ? "" : short(tick))) },
    ],
    cursor: { sync: { key: "rounds" }, points: { size: 7 }, drag: { x: true, y: false } },
    hooks: {
      draw: [mark],
      setCursor: [(u) => showValues(entry, pointed(u))],
      ready: [(u) => onRound && u.over.addEventListener("click", () => pointed(u) !== null && onRound(pointed(u)))],
    },
  };
  entry.plot = new window.uPlot(options, columnsOf(lines), box);
  sync().sub(entry.plot);
  showValues(entry, null);
}

/** The round under the pointer, or null. */
function pointed(u) {
  return u.data[0][u.cursor.idx ?? -1] ?? null;
}

function mark(u) {
  if (marked === null) return;
  const x = u.valToPos(marked, "x", true);
  if (x < u.bbox.left || x > u.bbox.left + u.bbox.width) return;
  u.ctx.save();
  u.ctx.strokeStyle = colour("--ink");
  u.ctx.globalAlpha = 0.6;
  u.ctx.setLineDash([4, 4]);
  u.ctx.beginPath();
  u.ctx.moveTo(x, u.bbox.top);
  u.ctx.lineTo(x, u.bbox.top + u.bbox.height);
  u.ctx.stroke();
  u.ctx.restore();
}

function showValues(entry, round) {
  const at = round ?? marked;
  const lines = entry.lines.filter((line) => !line.thin);
  const shown = lines.slice(0, 6).map((line) => {
    const value = at === null ? line.y.findLast((v) => v !== null) ?? null : valueAt(line, at);
    return el("span", { title: line.label }, swatch(entry.colourOf(line)), short(value));
  });
  const more = lines.length > 6 ? el("span", { class: "dim" }, `+${lines.length - 6}`) : null;
  replace(entry.values, el("span", { class: "dim" }, at === null ? "last" : `round ${at}`), shown, more);
}

export function markRound(round) {
  marked = round;
  for (const entry of drawn) {
    if (entry.plot && entry.figure.isConnected) {
      entry.plot.redraw(false);
      showValues(entry, null);
    }
  }
}

export function redraw() {
  for (const entry of drawn) if (entry.plot && entry.figure.isConnected) entry.plot.redraw(false);
}

/** Frees the charts that have left the page. */
export function sweep() {
  for (const entry of drawn) {
    if (!entry.figure.isConnected) {
      entry.observer.disconnect();
      if (entry.plot) entry.plot.destroy();
      drawn.delete(entry);
    }
  }
}
