// Two policies on the same held-out prompts: which prompts flipped.

import { choice, count, el, named, note, replace, short, signed, table, visible } from "./dom.js";
import { readPart } from "./data.js";
import { facts, prompt, verdict } from "./group.js";
import { change, state } from "./state.js";
import { tokenText } from "./tokens.js";

const KINDS = [["flips", "all flips"], ["better", "flipped right"], ["worse", "flipped wrong"], ["all", "all prompts"]];
let drawing = 0;

export async function drawCompare(view, data) {
  const points = data.heldout.points;
  const runs = data.runs.filter((run) => points[run.run]);
  if (!runs.length) {
    replace(view, el("h2", {}, "Compare"), note("Nothing evaluated yet, so there is nothing to compare."));
    return;
  }
  const [one, other] = sides(runs, points);
  const found = outcome(data.heldout, one, other);
  const kind = state().flips || "flips";
  const wanted = chosen(found, kind);
  const asked = state().prompt ?? wanted[0]?.id;
  const turn = (drawing += 1);
  const detail = el("div", { id: "pair" });
  replace(
    view,
    el("h2", {}, "Compare"),
    el(
      "div",
      { class: "controls" },
      chooser("A", "a", runs, points, one),
      chooser("B", "b", runs, points, other),
      choice("Show", KINDS, kind, (value) => change({ flips: value }), { id: "flips" }),
    ),
    summary(found, one, other),
    el("div", { class: "browser" }, prompts(wanted, data, asked), detail),
  );
  if (asked) await drawPair(detail, asked, one, other, data, () => turn === drawing);
  else replace(detail, note("Choose a prompt to see what both wrote."));
}

/** By default the last evaluations of two names; with one name, its first evaluation against its last. */
function sides(runs, points) {
  const query = state();
  const first = runs.find((run) => !run.parent) || runs[0];
  const second = runs.find((run) => run.name !== first.name);
  const rounds = (run) => Object.keys(points[run]).map(Number).sort((x, y) => x - y);
  const side = (given, run, last) => {
    const [name, round] = (given || "").split("@");
    if (points[name]?.[round]) return { run: name, round: Number(round) };
    const all = rounds(run);
    return { run, round: last ? all[all.length - 1] : all[0] };
  };
  return [side(query.a, first.run, Boolean(second)), side(query.b, (second || first).run, true)];
}

function chooser(label, key, runs, points, chosen) {
  const rounds = Object.keys(points[chosen.run]).map(Number).sort((x, y) => x - y);
  const set = (run, round) => change({ [key]: `${run}@${round}`, prompt: null });
  const nearest = (run) => {
    const all = Object.keys(points[run]).map(Number);
    return all.includes(chosen.round) ? chosen.round : Math.max(...all);
  };
  return el(
    "span",
    { class: "joined" },
    choice(label, named(runs.map((run) => run.run)), chosen.run, (run) => set(run, nearest(run)), { id: `${key}-run` }),
    choice("round", named(rounds), chosen.round, (round) => set(chosen.run, round), { id: `${key}-round` }),
  );
}

/** Shares of right samples on the prompts that both were asked; a flip crosses one half. */
export function outcome({ prompts, points }, one, other) {
  const sides = [one, other].map(({ run, round }) => points[run][round]);
  const share = (point, i) => (point.c[i] < 0 ? null : point.c[i] / (typeof point.n === "number" ? point.n : point.n[i]));
  const rows = [];
  prompts.forEach((id, i) => {
    const [a, b] = sides.map((point) => share(point, i));
    if (a !== null && b !== null) rows.push({ id, a, b, flip: flipOf(a, b) });
  });
  return rows;
}

function flipOf(a, b) {
  if (a < 0.5 && b >= 0.5) return "better";
  return a >= 0.5 && b < 0.5 ? "worse" : "";
}

/**
 * Mean of B - A over prompts with the ends of its 95 % interval (normal, of paired differences); null ends where there
 * are fewer than two prompts or all differ alike: a deviation of nothing is no certainty.
 */
export function gainOf(found) {
  const differences = found.map((row) => row.b - row.a);
  const n = differences.length;
  const gain = differences.reduce((total, d) => total + d, 0) / n;
  const squares = differences.reduce((total, d) => total + (d - gain) ** 2, 0);
  if (n < 2 || squares < 1e-12) return { gain, low: null, high: null };
  const half = 1.96 * Math.sqrt(squares / (n - 1) / n);
  return { gain, low: gain - half, high: gain + half };
}

function spreadOf(found) {
  const { low, high } = gainOf(found);
  if (low !== null) return `(95 % interval ${signed(low)} to ${signed(high)}, over prompts)`;
  return found.length < 2 ? "(one prompt: no interval)" : "(the same on every prompt: no interval)";
}

function summary(found, one, other) {
  const [better, worse] = ["better", "worse"].map((kind) => found.filter((row) => row.flip === kind).length);
  const mean = (key) => found.reduce((total, row) => total + row[key], 0) / found.length;
  const percent = (key) => `${(100 * mean(key)).toFixed(1)} %`;
  if (!found.length) return note("These two were not asked the same prompts.");
  const both = found.filter((row) => row.a >= 0.5 && row.b >= 0.5).length;
  const neither = found.length - both - better - worse;
  return [
    table(
      ["", `B right`, `B wrong`],
      [
        ["A right", String(both), el("b", { class: "worse" }, `${worse} flipped wrong`)],
        ["A wrong", el("b", { class: "better" }, `${better} flipped right`), String(neither)],
      ],
      [1, 2],
    ),
    el(
      "p",
      { id: "difference" },
      `On ${count(found.length)} prompts A is right in ${percent("a")} of the samples and B in ${percent("b")}: ` +
        `${signed(mean("b") - mean("a"))} ${spreadOf(found)}.`,
    ),
    note(
      `A: ${one.run}, round ${one.round}. B: ${other.run}, round ${other.round}. A prompt counts as right where at least ` +
        "half of its samples are. rollway compare has the statistics over seeds.",
    ),
  ];
}

/** Prompts of one kind, the largest change first. */
function chosen(found, kind) {
  const wanted = found.filter((row) => kind === "all" || (kind === "flips" ? row.flip : row.flip === kind));
  return wanted.sort((x, y) => Math.abs(y.b - y.a) - Math.abs(x.b - x.a) || (x.id < y.id ? -1 : 1));
}

function prompts(wanted, data, asked) {
  const lines = wanted.slice(0, 500).map((row) =>
    el(
      "div",
      {
        class: `line ${row.flip}${row.id === asked ? " chosen" : ""}`,
        role: "option",
        "aria-selected": String(row.id === asked),
        on: { click: () => change({ prompt: row.id }) },
      },
      el("span", { class: "cut asked" }, visible((data.prompts.get(row.id)?.[2]?.at(-1)?.[1] ?? row.id).slice(0, 120))),
      el("span", { class: "num" }, `${short(row.a)} \u2192 ${short(row.b)}`),
      el("span", { class: "num" }, signed(row.b - row.a)),
    ),
  );
  const none = lines.length ? null : note("None.");
  return el("div", { id: "list", role: "listbox", "aria-label": "Prompts", tabindex: 0 }, lines, none);
}

async function drawPair(box, id, one, other, data, current) {
  const parts = await Promise.all([one, other].map((side) => readPart(side.run, data.limits.unknown)));
  if (!current()) return;
  const columns = [one, other].map((side, i) => {
    const rows = parts[i].samples.filter((row) => row.prompt === id && row.round === side.round);
    const cards = rows.map((row) =>
      el("article", { class: `card ${verdict(row)}` }, facts(row), tokenText(row, parts[i].pieces, "logp")),
    );
    const none = note("Its samples are not in this page; `rollway sql` has them in `evals`.");
    const title = visible(`${i ? "B" : "A"}: ${side.run}, round ${side.round}`);
    return el("div", {}, el("h3", {}, title), cards.length ? cards : none);
  });
  replace(box, prompt(id, data), el("div", { class: "pair" }, columns));
}
