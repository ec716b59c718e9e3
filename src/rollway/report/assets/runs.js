// Runs: fork tree, rule graph, where configs differ, one config in full.

import { choice, el, field, replace, table, visible } from "./dom.js";
import { forkTree, ruleGraph } from "./graph.js";
import { change, state } from "./state.js";

export function drawRuns(view, data) {
  replace(
    view,
    el("h2", {}, "Runs and forks"),
    forkTree(data, data.colours),
    forkWords(data),
    el("h2", {}, "Rule graph"),
    el("p", { class: "note" }, "Which rule reads whose files; dashed lines lead into the next round or pass. Which edges a run has depends on its config."),
    ruleGraph(data),
    el("h2", {}, "Where configs differ"),
    differences(data),
    el("h2", {}, "Config"),
    config(data),
  );
}

function forkWords(data) {
  const forks = data.forks.filter((row) => row.parent);
  return forks.length
    ? el("ul", { class: "note" }, forks.map((row) => el("li", {}, visible(`${row.run} forked from ${row.parent}, round ${row.round}, after ${row.stage}`))))
    : null;
}

function differences(data) {
  const rows = data.differences;
  const names = rows.length ? Object.keys(rows[0].values) : [];
  if (!rows.length) return el("p", { class: "note" }, Object.keys(data.configs).length ? "All configurations are the same." : "No run.json yet.");
  const few = names.length > 6;
  const [one, other] = [names.includes(state().one) ? state().one : names[0], names.includes(state().other) ? state().other : names[1]];
  const shown = few ? [one, other] : names;
  const wanted = rows.filter((row) => shown.some((name) => text(row.values[name]) !== text(row.values[shown[0]])));
  const pick = few
    ? el(
        "div",
        { class: "controls" },
        choice("Between", names.map((name) => [name, name]), one, (value) => change({ one: value })),
        choice("and", names.map((name) => [name, name]), other, (value) => change({ other: value })),
      )
    : null;
  const cells = wanted.map((row) => [
    el("code", {}, visible(row.key)),
    ...shown.map((name) => el("code", { class: text(row.values[name]) === text(row.values[shown[0]]) ? "dim" : "differs" }, visible(text(row.values[name])))),
  ]);
  return [pick, cells.length ? table(["key", ...shown.map(visible)], cells) : el("p", { class: "note" }, "These two are the same.")];
}

function text(value) {
  return typeof value === "string" ? value : JSON.stringify(value);
}

function config(data) {
  const runs = Object.keys(data.configs);
  if (!runs.length) return el("p", { class: "note" }, "No run.json yet.");
  const run = runs.includes(state().run) ? state().run : runs[0];
  const body = el("tbody");
  const fill = (part) => {
    const rows = Object.entries(data.configs[run]).filter(([key, value]) => `${key} ${text(value)}`.toLowerCase().includes(part.toLowerCase()));
    replace(body, rows.map(([key, value]) => el("tr", {}, el("td", {}, el("code", {}, visible(key))), el("td", {}, el("code", {}, visible(text(value)))))));
  };
  fill("");
  return [
    el(
      "div",
      { class: "controls" },
      choice("Run", runs.map((name) => [name, name]), run, (value) => change({ run: value })),
      field("Find", { type: "search", placeholder: "key or value" }, fill),
    ),
    el("div", { class: "scroll config", tabindex: 0 }, el("table", {}, body)),
  ];
}
