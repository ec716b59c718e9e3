// The first view: what stands out, the main curves, what the page holds.

import { button, count, el, note, replace, swatch, visible } from "./dom.js";
import { chart } from "./charts.js";
import { hiddenNames } from "./curves.js";
import { linesOf } from "./series.js";
import { change } from "./state.js";

const MAIN = ["held-out pass@1", "reward", "length", "entropy"];
const WORDS = { bad: "wrong", watch: "to watch", good: "fine" };

export function drawOverview(view, data) {
  let more = view.querySelector(".more");
  if (!more) {
    more = el("div", { class: "more" });
    view.append(more);
  }
  const curves = data.curves.filter((curve) => MAIN.includes(curve.title));
  replace(more, healthLine(data), el("h2", {}, "Main curves"), legend(data), charts(data, curves), holds(data));
}

function healthLine(data) {
  const counts = { bad: 0, watch: 0, good: 0 };
  for (const check of data.health) if (check.level) counts[check.level] += 1;
  const parts = Object.keys(counts).map((level) =>
    el("span", { class: `level ${counts[level] ? level : "none"}` }, `${counts[level]} ${WORDS[level]}`),
  );
  const worst = data.health.filter((check) => check.level === "bad" || check.level === "watch");
  return [
    el("h2", {}, "Health"),
    el("p", { class: "badges" }, parts, button("Look at the checks", () => change({ page: "health" }))),
    worst.length ? note(`Look at: ${worst.map((check) => check.title.toLowerCase()).join(", ")}.`) : null,
  ];
}

export function legend(data) {
  const hidden = hiddenNames(data);
  const names = Object.entries(data.colours).filter(([name]) => !hidden.has(name));
  const shown = names.map(([name, number]) => el("span", {}, swatch(number), visible(name)));
  const more = hidden.size ? el("span", { class: "dim" }, `and ${hidden.size} more under Curves`) : null;
  return el("div", { class: "legend" }, shown, more);
}

function charts(data, curves) {
  if (!curves.length) return note("No figures yet.");
  const onRound = (round) => change({ page: "curves", round });
  const hidden = hiddenNames(data);
  const drawn = curves.map((curve) =>
    chart(curve.title, curve.note, linesOf(curve.series, data.runs, { hidden }), (line) => data.colours[line.name], { onRound }),
  );
  return el("div", { class: "panels" }, drawn);
}

function holds(data) {
  const { rollouts, shown, samples, prompts, asked, group, head, tail } = data.limits;
  const whole = shown >= rollouts;
  const sentence = whole
    ? `All ${count(rollouts)} rollouts of this folder are in this page`
    : `${count(shown)} of the ${count(rollouts)} rollouts of this folder are in this page: ` +
      "whole groups, spread evenly over runs and rounds and chosen by a hash of their prompt, never by result";
  const limits =
    `At most ${group} rollouts of a group; of a completion longer than ${count(head + tail)} tokens ` +
    `the first ${count(head)} and the last ${tail}. Held-out: the counts of ${count(prompts)} of ` +
    `${count(asked)} prompts, and ${count(samples)} samples in full.`;
  return [
    el("h2", {}, "What is in this page"),
    el("p", {}, `${sentence}. ${limits} Curves, health and counts are of everything.`),
    el("p", { class: "note" }, "Everything else: ", el("code", {}, "rollway sql"), " and ", el("code", {}, "rollway show ROLLOUT_ID"), "."),
  ];
}
