// All curves: which runs, seeds and intervals, smoothing, one marked round, any other metric.

import { button, choice, el, find, named, note, replace, swatch, visible } from "./dom.js";
import { chart, markRound } from "./charts.js";
import { linesOf } from "./series.js";
import { change, state } from "./state.js";

const BANDS = [["t", "95 % of the mean"], ["range", "lowest to highest seed"], ["none", "none"]];

export function drawCurves(view, data) {
  const hidden = hiddenNames(data);
  replace(view, el("h2", {}, "Curves"), chips(data, hidden), controls(data), rounds(data), panels(data, hidden), explain());
}

/** Names that are not drawn. Colours repeat after eight: of more names only the first eight are drawn at first. */
export function hiddenNames(data) {
  const { hide } = state();
  if (hide !== undefined) return new Set(hide.split("|").filter((name) => name && name !== "-"));
  return new Set(Object.keys(data.colours).slice(8));
}

function chips(data, hidden) {
  const toggle = (name) => {
    if (!hidden.delete(name)) hidden.add(name);
    change({ hide: [...hidden].join("|") || "-" });
  };
  const names = Object.entries(data.colours).map(([name, number]) =>
    button([swatch(number), visible(name)], () => toggle(name), {
      class: "chip",
      "aria-pressed": String(!hidden.has(name)),
    }),
  );
  const all = Object.keys(data.colours);
  const only = all.length > 1
    ? [
        button("all", () => change({ hide: "-" }), { class: "chip plain" }),
        button("none", () => change({ hide: all.join("|") }), { class: "chip plain" }),
      ]
    : [];
  return el("div", { class: "chips", role: "group", "aria-label": "Runs" }, names, only);
}

function controls(data) {
  const { band = "t", seeds = "", smooth = 0, metric = "" } = state();
  const chosen = metric.split("|").filter(Boolean);
  const others = Object.keys(data.metrics).filter((name) => !chosen.includes(name));
  const add = (name) => change({ metric: [...chosen, name].join("|") });
  return el(
    "div",
    { class: "controls" },
    choice("Band", BANDS, band, (value) => change({ band: value })),
    el(
      "label",
      { class: "field" },
      el("span", {}, "Each seed"),
      el("input", {
        type: "checkbox",
        checked: Boolean(seeds),
        on: { change: (e) => change({ seeds: e.target.checked ? "1" : null }) },
      }),
    ),
    el(
      "label",
      { class: "field" },
      el("span", {}, "Smoothing"),
      el("input", {
        type: "range",
        min: 0,
        max: 0.95,
        step: 0.05,
        value: smooth,
        on: { change: (e) => change({ smooth: e.target.value }) },
      }),
    ),
    choice("Add a metric", [["", `${others.length} more`], ...named(others)], "", add),
    chosen.length ? button("Only the standard ones", () => change({ metric: null })) : null,
  );
}

/** First and last round of any curve. */
export function span(data) {
  let first = Infinity;
  let last = -Infinity;
  for (const curve of data.curves) {
    for (const [x] of Object.values(curve.series)) {
      if (x.length) [first, last] = [Math.min(first, x[0]), Math.max(last, x[x.length - 1])];
    }
  }
  return first <= last ? [first, last] : [0, 0];
}

function rounds(data) {
  const [first, last] = span(data);
  const at = Number(state().round ?? last);
  const output = el("output", {}, state().round === undefined ? "no round marked" : `round ${at}`);
  const slide = (value) => {
    output.textContent = `round ${value}`;
    change({ round: value }, true);
    markRound(Number(value));
  };
  const slider = el("input", {
    type: "range",
    min: first,
    max: last,
    step: 1,
    value: at,
    id: "round-slider",
    on: { input: (e) => slide(e.target.value) },
  });
  return el(
    "div",
    { class: "controls rounds" },
    el("label", { class: "field wide" }, el("span", {}, "Round"), slider, output),
    button("Rollouts of this round", () => change({ page: "rollouts", round: find("#round-slider").value })),
    button("Unmark", () => change({ round: null })),
  );
}

function panels(data, hidden) {
  const { band = "t", seeds, smooth = 0, metric = "", round } = state();
  markRound(round === undefined ? null : Number(round));
  const extra = metric.split("|").filter((name) => data.metrics[name]);
  const curves = [
    ...extra.map((name) => ({ title: name, note: "mean over the round's steps", series: data.metrics[name] })),
    ...data.curves,
  ];
  if (!curves.length) return note("No figures yet.");
  const options = { hidden, band, seeds: Boolean(seeds), smooth: Number(smooth) };
  const drawn = curves
    .map((curve) => [curve, linesOf(curve.series, data.runs, options)])
    .filter(([, lines]) => lines.length)
    .map(([curve, lines]) =>
      chart(curve.title, curve.note, lines, (line) => data.colours[line.name], { onRound: (at) => change({ round: at }) }),
    );
  return drawn.length ? el("div", { class: "panels" }, drawn) : note("No run is chosen.");
}

function explain() {
  return el(
    "p",
    { class: "note" },
    "Horizontal: rounds. With several seeds the line is their mean over rounds that all have reached, and the band its 95 % " +
      "interval by Student's t, or the range of seeds. With one seed the band is the figure's own interval where it has one " +
      "(held-out figures: a bootstrap over prompts). " +
      "Drag over a chart to zoom, double-click to zoom out, click to mark a round.",
  );
}
