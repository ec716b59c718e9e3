// The rollout browser: a list to filter and sort on the left, a prompt with its group on the right.

import { button, choice, count, el, field, find, named, note, replace, short, signed, visible } from "./dom.js";
import { readPart } from "./data.js";
import { keyOfGroup, selected, SORTS, sortsOf } from "./filters.js";
import { drawGroup, verdict } from "./group.js";
import { change, state } from "./state.js";

const PAGE = 100;
const NARROW = 960;
const ENDS = ["low", "high", "advantageLow", "advantageHigh", "shortest", "longest"];
const FILTERS = ["finish", "right", "source", "used", "scorer", ...ENDS, "text"];
const CLEARED = Object.fromEntries([...FILTERS, "pick"].map((name) => [name, null]));
let shown = { rows: [], place: -1 };
let limit = PAGE;
let drawing = 0;
let filtersOpen = null;
let jump = null;

export async function drawRollouts(view, data) {
  const query = state();
  const runs = data.runs.filter((run) => run.rollouts.length || run.samples.length);
  if (!runs.length) {
    replace(view, el("h2", {}, "Rollouts"), note("No rollouts yet."));
    return;
  }
  const run = runs.find((one) => one.run === query.run) || runs.find((one) => !one.parent) || runs[0];
  const kind = query.kind === "samples" && run.samples.length ? "samples" : run.rollouts.length ? "rollouts" : "samples";
  const turn = (drawing += 1);
  const part = await readPart(run.run, data.limits.unknown);
  if (turn !== drawing) return;
  const rows = part[kind];
  const wording = (prompt) => (data.prompts.get(prompt)?.[2] || []).map(([, content]) => content).join("\n");
  const rounds = run[kind];
  const asked = { ...query, round: rounds.includes(Number(query.round)) ? query.round : "all" };
  const found = selected(rows, asked, wording);
  const chosen = rows[Number(query.pick)] && query.pick !== undefined ? rows[Number(query.pick)] : found[0];
  shown = { rows: found, place: found.indexOf(chosen) };
  const focused = document.activeElement?.id;
  const caret = document.activeElement?.selectionStart;
  const scrolled = find("#list", view)?.scrollTop ?? 0;
  const detail = el("div", { id: "detail", tabindex: "-1" });
  replace(
    view,
    el("h2", {}, "Rollouts"),
    places(data, runs, run, kind, rounds, asked, rows),
    filters(rows, asked, kind),
    shownOf(found, rows, run, kind),
    el("div", { class: query.pick === undefined ? "browser" : "browser picked" }, list(found, chosen, data, kind), detail),
  );
  if (chosen) drawGroup(detail, chosen, part, data);
  else replace(detail, note("Nothing fits. Clear the filters to see all."));
  restore(view, focused, caret, scrolled);
  if (jump && window.innerWidth <= NARROW) find(jump, view).scrollIntoView();
  jump = null;
}

/** The view is drawn anew at every change: what had the focus gets it back. */
function restore(view, focused, caret, scrolled) {
  const box = find("#list", view);
  const line = find(".chosen", box);
  box.scrollTop = scrolled;
  const hidden = line && (line.offsetTop < scrolled || line.offsetTop + line.offsetHeight > scrolled + box.clientHeight);
  if (hidden) box.scrollTop = line.offsetTop - box.clientHeight / 2;
  const again = focused ? document.getElementById(focused) : null;
  if (!again || !view.contains(again)) return;
  again.focus({ preventScroll: true });
  if (caret !== null && caret !== undefined && again.type === "search") again.setSelectionRange(caret, caret);
}

function places(data, runs, run, kind, rounds, query, rows) {
  const kinds = [["rollouts", "training rollouts"], ["samples", "held-out samples"]].filter(([name]) => run[name].length);
  const turn = (step) => {
    const at = query.round === "all" ? (step > 0 ? -1 : rounds.length) : rounds.indexOf(Number(query.round));
    const next = rounds[Math.max(0, Math.min(rounds.length - 1, at + step))];
    change({ round: next, pick: null });
  };
  const plain = SORTS.filter(([key]) => kind === "rollouts" || !key.includes("advantage"));
  const sorts = [...plain, ...sortsOf(scorersOf(rows))];
  const go = (name) => (value) => change({ [name]: value, pick: null });
  const pick = (label, name, options, value) => choice(label, options, value, go(name), { id: name });
  return el(
    "div",
    { class: "controls" },
    pick("Run", "run", named(runs.map((one) => one.run)), run.run),
    pick("Of", "kind", kinds, kind),
    el(
      "span",
      { class: "joined" },
      button("\u2039", () => turn(-1), { "aria-label": "earlier round", id: "earlier" }),
      pick("Round", "round", [["all", `all ${rounds.length}`], ...named(rounds)], query.round),
      button("\u203a", () => turn(1), { "aria-label": "later round", id: "later" }),
    ),
    pick("Sort", "sort", sorts, query.sort || "order"),
  );
}

function scorersOf(rows) {
  return [...new Set(rows.flatMap((row) => Object.keys(row.scores)))].sort();
}

function filters(rows, query, kind) {
  const distinct = (name) => [...new Set(rows.map((row) => row[name]).filter(Boolean))].sort();
  const any = (names) => [["", "any"], ...named(names)];
  const set = (name) => (value) => change({ [name]: value, pick: null });
  const scorers = scorersOf(rows);
  const sources = distinct("source");
  const active = FILTERS.filter((name) => query[name] !== undefined);
  const pick = (label, name, options) => choice(label, options, query[name] ?? "", set(name), { id: name });
  const number = (label, name) => {
    const attributes = { type: "number", step: "any", value: query[name] ?? "", id: `filter-${name}` };
    return field(label, attributes, set(name));
  };
  const search = { type: "search", value: query.text ?? "", placeholder: "in prompt, completion or id", id: "search" };
  const open = filtersOpen ?? window.innerWidth > 640;
  return el(
    "details",
    { class: "filters", open, on: { toggle: (event) => (filtersOpen = event.target.open) } },
    el("summary", {}, active.length ? `Filters (${active.length} set)` : "Filters"),
    el(
      "div",
      { class: "controls" },
      field("Text", search, set("text")),
      pick("Verdict", "right", any(["right", "wrong"])),
      pick("Finish", "finish", any(distinct("finish"))),
      sources.length > 1 ? pick("Source", "source", any(sources)) : null,
      kind === "rollouts" ? pick("Trained on", "used", any(["yes", "no"])) : null,
      scorers.length ? pick("Reward of", "scorer", [["", "the method"], ...named(scorers)]) : null,
      number("at least", "low"),
      number("at most", "high"),
      kind === "rollouts" ? number("Advantage from", "advantageLow") : null,
      kind === "rollouts" ? number("to", "advantageHigh") : null,
      number("Tokens from", "shortest"),
      number("to", "longest"),
      active.length ? button("Clear filters", () => change(CLEARED), { id: "clear" }) : null,
    ),
  );
}

function shownOf(found, rows, run, kind) {
  const groups = new Set(found.map(keyOfGroup)).size;
  const inherits = run.parent && kind === "rollouts" && run.fork_round > 0;
  const fork = inherits ? ` Rounds before ${run.fork_round} are those of ${run.parent}.` : "";
  return el(
    "p",
    { class: "note", id: "count", role: "status" },
    `${count(found.length)} of ${count(rows.length)} in ${count(groups)} groups.${fork}`,
  );
}

function list(found, chosen, data, kind) {
  const place = found.indexOf(chosen);
  const most = Math.max(limit, place + 1);
  const rows = found.slice(0, most).map((row) => line(row, row === chosen, data, kind));
  const rest = found.length - most;
  const further = rest > 0 ? button(`${count(rest)} more`, more, { class: "rest" }) : null;
  return el("div", { id: "list", role: "listbox", "aria-label": "Rollouts", tabindex: 0 }, rows, further);
}

function more() {
  limit += PAGE * 5;
  change({});
}

function line(row, chosen, data, kind) {
  const asked = data.prompts.get(row.prompt)?.[2]?.at(-1)?.[1] ?? row.prompt;
  return el(
    "div",
    {
      class: `line ${verdict(row)}${chosen ? " chosen" : ""}`,
      role: "option",
      "aria-selected": String(chosen),
      on: { click: () => open(row) },
    },
    el("span", { class: "dim" }, `r${row.round}`),
    el("span", { class: "cut asked" }, visible(asked.slice(0, 120))),
    el("span", { class: "cut said" }, visible((row.text ?? "").slice(0, 120))),
    el("span", { class: "num" }, short(row.reward)),
    kind === "rollouts" ? el("span", { class: "num dim" }, signed(row.advantage)) : null,
  );
}

function open(row) {
  jump = "#detail";
  change({ pick: row.place });
}

/** The next or the previous rollout of the list. */
export function step(by) {
  const row = shown.rows[Math.max(0, Math.min(shown.rows.length - 1, shown.place + by))];
  if (row) open(row);
}

/** Another round, from the keyboard. */
export function turnRound(by) {
  find(by > 0 ? "#later" : "#earlier")?.click();
}

export function closeDetail() {
  jump = "#list";
  change({ pick: null });
}
