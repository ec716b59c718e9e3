// The checks in words, the worst first.

import { button, el, note, replace, visible } from "./dom.js";
import { change } from "./state.js";

const WORDS = { bad: "wrong", watch: "watch", good: "fine" };
const FEW = 8;

export function drawHealth(view, data) {
  const checks = data.health.map(check);
  const none = note("This folder holds no run yet, so there is nothing to check.");
  const intro = el(
    "p",
    { class: "note" },
    "Most checks look at the last quarter of the rounds, some beside the first; engine and trainer, gradient, held-out, " +
      "errors and leak look at all of them. The limits are rules of thumb: they say where to look, not what is true.",
  );
  replace(view, el("h2", {}, "Health"), data.runs.length ? [intro, checks] : none);
}

function check(one) {
  const loud = one.verdicts.filter(([, level]) => level !== "good");
  const quiet = one.verdicts.filter(([, level]) => level === "good");
  const first = loud.length ? loud : quiet.slice(0, 1);
  const rest = loud.length ? quiet : quiet.slice(1);
  const folded = [...first.slice(FEW), ...rest];
  return el(
    "section",
    { class: "check", "data-check": one.title },
    el("h3", {}, badge(one.level), one.title, " ", el("small", {}, one.meaning)),
    el("ul", {}, first.slice(0, FEW).map(verdictLine)),
    folded.length ? more(folded) : null,
    unknown(one.unknown),
  );
}

function more(verdicts) {
  return el("details", {}, el("summary", {}, `${verdicts.length} more`), el("ul", {}, verdicts.map(verdictLine)));
}

function unknown(runs) {
  if (!runs.length) return null;
  return note(`Not known of ${runs.length === 1 ? runs[0] : `${runs.length} runs`}.`);
}

function badge(level) {
  return el("span", { class: `level ${level || "none"}` }, level ? WORDS[level] : "no data");
}

function verdictLine([run, level, text]) {
  const name = run ? button(visible(run), () => change({ page: "rollouts", run, pick: null }), { class: "link" }) : null;
  return el("li", { class: level }, name, name ? ": " : null, visible(text));
}
