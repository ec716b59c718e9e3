// The rule graph and the fork tree, drawn as SVG.

import { el, note, seconds, svg, visible } from "./dom.js";

const PLACES = {
  prepare: [0, 1], warmup: [1, 0], reward_model: [1, 2], rollout: [2, 1], discriminator: [2, 2], score: [3, 2], curate: [4, 1], train: [5, 0],
  check_teacher: [4, 0], evaluate: [6, 2], lm_eval: [6, 1], describe: [6, 3], catalog: [7, 0], report: [7, 2], track: [8, 1],
};
const MAIN = [
  ...["prepare warmup", "warmup rollout", "rollout score", "score curate", "curate train"],
  ...["train rollout", "train evaluate"],
];
const OPTIONAL = ["reward_model", "lm_eval", "check_teacher", "discriminator"];
const WIDTH = 104;
const HEIGHT = 44;
const GAP = [34, 26];

/** Rules of the workflow with their jobs and time; dashed: what leads into the next round. */
export function ruleGraph(data) {
  const spent = new Map(data.totals.map(([stage, jobs, wall]) => [stage, { jobs, wall }]));
  const x = (rule) => 8 + PLACES[rule][0] * (WIDTH + GAP[0]);
  const y = (rule) => 30 + PLACES[rule][1] * (HEIGHT + GAP[1]);
  const there = Object.keys(data.rules).filter((rule) => !OPTIONAL.includes(rule) || spent.has(rule));
  const pairs = there.flatMap((rule) => data.rules[rule].filter((need) => there.includes(need)).map((need) => [need, rule]));
  const edges = pairs.map(([need, rule]) => edge(need, rule, x, y));
  const nodes = there.map((rule) => node(rule, spent.get(rule), x(rule), y(rule)));
  const size = { width: 16 + 9 * (WIDTH + GAP[0]), height: 40 + 4 * (HEIGHT + GAP[1]) };
  const drawn = svg("svg", { class: "graph", ...size, role: "img", "aria-label": "Rules of the workflow" }, edges, nodes);
  return el("div", { class: "scroll", tabindex: 0 }, drawn);
}

function edge(from, to, x, y) {
  const back = PLACES[from][0] > PLACES[to][0];
  const kind = MAIN.includes(`${from} ${to}`) ? "edge main" : "edge";
  const [x0, y0, x1, y1] = [x(from) + WIDTH, y(from) + HEIGHT / 2, x(to), y(to) + HEIGHT / 2];
  if (from === to) {
    const right = x(from) + WIDTH - 12;
    const [left, top] = [right - 26, y(from)];
    return svg("path", { class: "edge back", d: `M${left} ${top} C${left} ${top - 24} ${right} ${top - 24} ${right} ${top}` });
  }
  if (PLACES[from][0] === PLACES[to][0]) {
    const middle = x(from) + WIDTH / 2;
    return svg("path", { class: kind, d: `M${middle} ${y(from) + HEIGHT} V${y(to)}` });
  }
  if (!back) {
    const bend = (x1 - x0) / 2;
    return svg("path", { class: kind, d: `M${x0} ${y0} C${x0 + bend} ${y0} ${x1 - bend} ${y1} ${x1} ${y1}` });
  }
  const top = Math.min(y(from), y(to)) - 22;
  const [a, b] = [x(from) + WIDTH / 2, x(to) + WIDTH / 2];
  return svg("path", { class: `${kind} back`, d: `M${a} ${y(from)} C${a} ${top} ${b} ${top} ${b} ${y(to)}` });
}

function node(rule, spent, x, y) {
  const below = spent ? `${spent.jobs} job${spent.jobs === 1 ? "" : "s"}, ${seconds(spent.wall)}` : "";
  return svg(
    "g",
    { class: spent ? "node" : "node idle" },
    svg("rect", { x, y, width: WIDTH, height: HEIGHT, rx: 6 }),
    svg("text", { x: x + WIDTH / 2, y: y + (below ? 18 : 27), "text-anchor": "middle" }, rule),
    below ? svg("text", { x: x + WIDTH / 2, y: y + 34, "text-anchor": "middle", class: "tick" }, below) : null,
  );
}

/** One line per run over its rounds; a fork leaves its parent's line at its round. */
export function forkTree(data, colours) {
  const rows = data.forks;
  if (!rows.length) return note("No run.json yet.");
  const last = Math.max(1, ...rows.map((row) => row.rounds || 0), ...data.runs.flatMap((run) => run.has));
  const label = 8 + Math.min(220, 7 * Math.max(...rows.map((row) => row.run.length + 2 * row.depth)));
  const x = (round) => label + 12 + (Math.max(160, 560) * round) / last;
  const y = (i) => 26 + i * 26;
  const place = new Map(rows.map((row, i) => [row.run, i]));
  const parts = rows.flatMap((row, i) => {
    const forked = place.has(row.parent);
    const start = x(forked ? row.round : 0);
    const end = x(row.rounds ?? Math.max(0, ...(data.byRun.get(row.run)?.has || [0])));
    const number = colours[data.byRun.get(row.run).name];
    const path = forked ? `M${start} ${y(place.get(row.parent))} V${y(i)}` : null;
    const branch = path ? svg("path", { class: `twig k${number}`, d: path }) : null;
    const words = row.parent ? `forked from ${row.parent}, round ${row.round}, after ${row.stage}` : "";
    return [
      branch,
      svg("text", { x: 4 + row.depth * 12, y: y(i) + 4 }, visible(row.run), words ? svg("title", {}, visible(words)) : null),
      svg("line", { class: `trunk k${number}`, x1: start, x2: end, y1: y(i), y2: y(i) }),
      svg("circle", { class: `k${number}`, cx: start, cy: y(i), r: 4 }),
      svg("text", { class: "tick", x: end + 8, y: y(i) + 4 }, `${row.rounds ?? "?"} rounds`),
    ];
  });
  const ends = [0, last].map((round) =>
    svg("text", { class: "tick", x: x(round), y: 12, "text-anchor": "middle" }, `round ${round}`),
  );
  const size = { width: x(last) + 90, height: y(rows.length) + 6 };
  const drawn = svg("svg", { class: "graph tree", ...size, role: "img", "aria-label": "Runs and forks" }, ends, parts);
  return el("div", { class: "scroll forks", tabindex: 0 }, drawn);
}
