// Where time and memory went.

import { choice, count, el, named, note, replace, seconds, short, swatch, table, visible } from "./dom.js";
import { chart } from "./charts.js";
import { change, state } from "./state.js";

export function drawCost(view, data) {
  if (!data.jobs.length) {
    replace(view, el("h2", {}, "Time and memory"), note("No job has left its usage beside its log, or the logs are not here."));
    return;
  }
  const runs = data.runs.filter((run) => data.jobs.some(([, of]) => of === run.run));
  const run = runs.find((one) => one.run === state().run) || runs.find((one) => !one.parent) || runs[0];
  replace(view, el("h2", {}, "Time and memory"), totals(data), run ? byRound(data, runs, run) : null);
}

function totals(data) {
  const most = Math.max(...data.totals.map((row) => row[2]));
  const all = data.totals.reduce((total, row) => total + row[2], 0);
  const rows = data.totals.map(([stage, jobs, wall, cpu, memory]) => [
    stage,
    short(jobs),
    bar(wall / most),
    seconds(wall),
    `${((100 * wall) / all).toFixed(0)} %`,
    seconds(cpu),
    seconds(wall / jobs),
    `${count(Math.round(memory))} MB`,
  ]);
  return [
    table(["stage", "jobs", "", "wall time", "share", "CPU time", "each job", "peak memory"], rows, [1, 3, 4, 5, 6, 7]),
    note(
      "Sums over all jobs of all runs; jobs that ran side by side count each. Memory: the largest process of the stage. " +
        "Jobs under the warm worker count the worker's memory too.",
    ),
  ];
}

function bar(share) {
  const box = el("i", { class: "bar long" });
  box.style.setProperty("--share", `${100 * share}%`);
  return box;
}

function byRound(data, runs, run) {
  const stages = new Map();
  for (const [stage, of, round, wall, , memory] of data.jobs) {
    if (of !== run.run || round === null) continue;
    if (!stages.has(stage)) stages.set(stage, new Map());
    const at = stages.get(stage).get(round) || { wall: 0, memory: 0 };
    stages.get(stage).set(round, { wall: at.wall + wall, memory: Math.max(at.memory, memory) });
  }
  const names = [...stages.keys()];
  const lines = (key) => names.map((stage) => lineOf(stage, stages.get(stage), (at) => at[key]));
  const colour = (line) => names.indexOf(line.name) % 8;
  const sampled = new Map(data.tokens.filter(([of]) => of === run.run).map(([, round, count]) => [round, count]));
  const rolled = [...(stages.get("rollout") || [])].filter(([round]) => sampled.has(round));
  const speed = new Map(rolled.map(([round, at]) => [round, sampled.get(round) / at.wall]));
  const fast = [lineOf("rollout", speed, (value) => value)];
  const panels = [
    chart("seconds by stage", "wall time of the round's jobs", lines("wall"), colour),
    chart("peak memory by stage", "MB, largest process", lines("memory"), colour),
    speed.size ? chart("rollout speed", "tokens sampled per second of the rollout jobs", fast, colour) : null,
  ];
  const legend = el("div", { class: "legend" }, names.map((name, i) => el("span", {}, swatch(i % 8), visible(name))));
  return [
    el("h2", {}, "By round"),
    el("div", { class: "controls" }, choice("Run", named(runs.map((one) => one.run)), run.run, (value) => change({ run: value }))),
    legend,
    el("div", { class: "panels" }, panels),
  ];
}

function lineOf(name, byRound, value) {
  const x = [...byRound.keys()].sort((a, b) => a - b);
  return { label: name, name, thin: false, x, y: x.map((round) => value(byRound.get(round))), low: null, high: null };
}
