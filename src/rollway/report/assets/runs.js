// Runs: fork tree, rule graph, where configs differ, one config in full.

import { choice, el, field, named, note, replace, table, visible } from "./dom.js";
import { forkTree, ruleGraph } from "./graph.js";
import { change, state } from "./state.js";

export function drawRuns(view, data) {
  replace(
    view,
    el("h2", {}, "Runs and forks"),
    forkTree(data, data.colours),
    forkWords(data),
    el("h2", {}, "Rule graph"),
    note(
      "Which rule reads whose files; dashed lines lead into the next round or pass. Which edges a run has depends on its " +
        "config.",
    ),
    ruleGraph(data),
    el("h2", {}, "Where configs differ"),
    differences(data),
    el("h2", {}, "Config"),
    config(data),
  );
}

function forkWords(data) {
  const forks = data.forks.filter((row) => row.parent);
  const words = (row) => `${row.run} forked from ${row.parent}, round ${row.round}, after ${row.stage}`;
  return forks.length ? el("ul", { class: "note" }, forks.map((row) => el("li", {}, visible(words(row))))) : null;
}

function differences(data) {
  const rows = data.differences;
  const names = rows.length ? Object.keys(rows[0].values) : [];
  if (!rows.length) return note(Object.keys(data.configs).length ? "All configurations are the same." : "No run.json yet.");
  const few = names.length > 6;
  const chosen = (key, usual) => (names.includes(state()[key]) ? state()[key] : usual);
  const [one, other] = [chosen("one", names[0]), chosen("other", names[1])];
  const shown = few ? [one, other] : names;
  const wanted = rows.filter((row) => shown.some((name) => text(row.values[name]) !== text(row.values[shown[0]])));
  const pick = few
    ? el(
        "div",
        { class: "controls" },
        choice("Between", named(names), one, (value) => change({ one: value })),
        choice("and", named(names), other, (value) => change({ other: value })),
      )
    : null;
  const cell = (row, name) => {
    const same = text(row.values[name]) === text(row.values[shown[0]]);
    return el("code", { class: same ? "dim" : "differs" }, visible(text(row.values[name])));
  };
  const cells = wanted.map((row) => [el("code", {}, visible(row.key)), ...shown.map((name) => cell(row, name))]);
  return [pick, cells.length ? table(["key", ...shown.map(visible)], cells) : note("These two are the same.")];
}

function text(value) {
  return typeof value === "string" ? value : JSON.stringify(value);
}

function config(data) {
  const runs = Object.keys(data.configs);
  if (!runs.length) return note("No run.json yet.");
  const run = runs.includes(state().run) ? state().run : runs[0];
  const body = el("tbody");
  const fill = (part) => {
    const lines = Object.entries(data.configs[run]).map(([key, value]) => [key, text(value)]);
    const found = lines.filter((line) => line.join(" ").toLowerCase().includes(part.toLowerCase()));
    const cell = (words) => el("td", {}, el("code", {}, visible(words)));
    replace(body, found.map((line) => el("tr", {}, line.map(cell))));
  };
  fill("");
  return [
    el(
      "div",
      { class: "controls" },
      choice("Run", named(runs), run, (value) => change({ run: value })),
      field("Find", { type: "search", placeholder: "key or value" }, fill),
    ),
    el("div", { class: "scroll config", tabindex: 0 }, el("table", {}, body)),
  ];
}
