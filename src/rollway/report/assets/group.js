// One prompt with its whole group side by side, and the same prompt in other rounds.

import { choice, el, note, replace, short, signed, svg, visible } from "./dom.js";
import { keyOfGroup, roundsOf } from "./filters.js";
import { change, remember, remembered, state } from "./state.js";
import { aboutToken, CHANNELS, legendOf, referenceOf, tokenText } from "./tokens.js";

/** Draws `row` and its group into `box`. `part`: the rollouts and samples of its run. */
export function drawGroup(box, row, part, data) {
  const rows = part[row.kind];
  const group = rows.filter((other) => keyOfGroup(other) === keyOfGroup(row));
  const channel = state().colour || remembered("colour") || "logp";
  const about = el("p", { class: "about", role: "status" }, "Point at a token, or touch it, to see its figures.");
  const cards = group.map((member) => card(member, row, group, rows, part, channel, about, data));
  replace(
    box,
    heading(row, group),
    prompt(row.prompt, data),
    colours(channel),
    about,
    el("div", { class: "cards" }, cards),
    acrossRounds(row, rows),
  );
}

function heading(row, group) {
  const rewards = group.map((member) => member.reward).filter((value) => value !== null);
  const mean = rewards.length ? rewards.reduce((a, b) => a + b, 0) / rewards.length : null;
  const kind = row.kind === "rollouts" ? "rollouts" : "held-out samples";
  return el(
    "h3",
    { class: "group-title" },
    `Round ${row.round}: ${group.length} ${kind}, mean reward ${short(mean)}`,
    el("span", { class: "dim" }, visible(row.kind === "rollouts" ? ` group ${row.group}` : "")),
  );
}

export function prompt(id, data) {
  const unknown = [null, null, [["prompt", `${id} (its text is not in results/tasks)`]], null];
  const [task, split, messages, answer] = data.prompts.get(id) || unknown;
  const line = (role, content) =>
    el("div", {}, el("span", { class: "role" }, visible(role)), el("div", { class: "text" }, visible(content)));
  const lines = messages.map(([role, content]) => line(role, content));
  const reference = answer === null ? null : line("answer", answer);
  const from = task === null ? null : el("span", { class: "dim" }, visible(`${task}, ${split}, ${id}`));
  return el("div", { class: "prompt" }, lines, reference, from);
}

function colours(channel) {
  const choose = (value) => {
    remember("colour", value);
    change({ colour: value });
  };
  const select = choice("Colour tokens by", CHANNELS, channel, choose, { id: "colour" });
  return el("div", { class: "controls" }, select, legendOf(channel));
}

function card(member, chosen, group, rows, part, channel, about, data) {
  const advantages = group.flatMap((one) => [one.advantage, ...(one.tokenAdvantage || [])]);
  const most = advantages.reduce((largest, value) => Math.max(largest, Math.abs(value ?? 0)), 0);
  const reference = channel === "ratio" ? referenceOf(member, rows) : null;
  const text = tokenText(member, part.pieces, channel, { reference, most, head: data.limits.head });
  const tell = (event) => {
    const i = event.target.dataset?.i;
    if (i === undefined) return;
    about.textContent = aboutToken(member, Number(i), part.pieces, reference ?? referenceOf(member, rows));
  };
  text.addEventListener("pointerover", tell);
  text.addEventListener("click", tell);
  return el(
    "article",
    { class: `card ${verdict(member)}${member === chosen ? " chosen" : ""}`, "data-sample": member.sample },
    facts(member),
    channel === "ratio" ? against(member, reference) : null,
    channel === "entropy" && !member.entropy ? note("No entropies are stored (rollout.entropy).") : null,
    text,
    parts(member),
    member.id ? el("p", { class: "dim id" }, visible(member.id)) : null,
  );
}

export function verdict(row) {
  return row.correct === true ? "right" : row.correct === false ? "wrong" : "";
}

export function facts(row) {
  const trained = row.kind === "rollouts" && !row.slots ? el("span", { class: "dim" }, "not trained on") : null;
  return el(
    "p",
    { class: "facts" },
    el("b", {}, `#${row.sample}`),
    el("span", {}, `reward ${short(row.reward)}`),
    row.advantage === null || row.advantage === undefined ? null : el("span", {}, `advantage ${signed(row.advantage)}`),
    el("span", {}, `${row.length} tokens`),
    el("span", { class: row.finish === "length" ? "warn" : null }, visible(row.finish)),
    row.source && row.source !== "policy" ? el("span", { class: "tag" }, visible(row.source)) : null,
    trained,
  );
}

function against(row, reference) {
  if (!reference) return note("No other policy in this page began its answer to this prompt with these tokens.");
  const { row: other, shared } = reference;
  return note(`Against the policy of round ${other.policy}: the same ${shared} of ${row.tokens.length} tokens.`);
}

function parts(row) {
  const scores = Object.entries(row.scores).filter(([, value]) => value !== null);
  const all = [...scores, ...row.parts];
  if (!all.length) return null;
  const numbers = all.filter(([, value]) => typeof value === "number").map(([, value]) => Math.abs(value));
  const most = Math.max(1e-9, ...numbers);
  return el(
    "dl",
    { class: "parts" },
    all.map(([name, value]) => [
      el("dt", {}, visible(name)),
      el("dd", {}, typeof value === "number" ? [bar(value, most), short(value)] : visible(value ?? "-")),
    ]),
  );
}

function bar(value, most) {
  const box = el("i", { class: value < 0 ? "bar below" : "bar" });
  box.style.setProperty("--share", `${(100 * Math.abs(value)) / most}%`);
  return box;
}

/** One column of dots per round that asked the prompt: height is reward, and a click leads there. */
function acrossRounds(row, rows) {
  const rounds = roundsOf(rows, row.prompt);
  const title = el("h3", {}, "The same prompt across rounds");
  if (rounds.size < 2) {
    return [title, note("Only this round of the page asked it. Held-out samples ask the same prompts again and again.")];
  }
  const rewards = [...rounds.values()].flat().map((one) => one.reward ?? 0);
  const [low, high] = [Math.min(...rewards), Math.max(...rewards)];
  const step = Math.max(16, Math.min(60, 640 / rounds.size));
  const height = 110;
  const y = (value) => 12 + (height - 24) * (1 - ((value ?? 0) - low) / (high - low || 1));
  const columns = [...rounds].map(([round, members], i) => column(round, members, 34 + i * step, y, row, height));
  const mean = (members) => members.reduce((total, one) => total + (one.reward ?? 0), 0) / members.length;
  const means = [...rounds.values()].map((members, i) => `${34 + i * step},${y(mean(members))}`);
  const size = { width: 50 + rounds.size * step, height: height + 20 };
  const picture = svg(
    "svg",
    { class: "across", ...size, role: "group", "aria-label": "Rewards of this prompt by round" },
    svg("text", { x: 2, y: 16, class: "tick" }, short(high)),
    svg("text", { x: 2, y: height - 8, class: "tick" }, short(low)),
    svg("polyline", { points: means.join(" "), class: "mean-line" }),
    columns,
  );
  return [title, el("div", { class: "scroll" }, picture), strip(rounds, row)];
}

function column(round, members, x, y, row, height) {
  const go = () => change({ pick: members[0].place });
  const dots = members.map((one, i) =>
    svg(
      "circle",
      { cx: x + ((i * 7) % 11) - 5, cy: y(one.reward), r: 3, class: `dot ${verdict(one)}` },
      svg("title", {}, `round ${round}, reward ${short(one.reward)}`),
    ),
  );
  const here = round === row.round ? "column here" : "column";
  const on = { click: go, keydown: (event) => (event.key === "Enter" ? go() : null) };
  return svg(
    "g",
    { class: here, tabindex: 0, role: "button", "aria-label": `round ${round}`, on },
    svg("rect", { x: x - 8, y: 0, width: 16, height: height + 18, class: "touch" }),
    dots,
    svg("text", { x, y: height + 14, class: "tick", "text-anchor": "middle" }, round),
  );
}

/** Best completion of each round as text, so that one sees what was learnt. */
function strip(rounds, row) {
  const lines = [...rounds].map(([round, members]) => {
    const best = members.reduce((a, b) => ((b.reward ?? -Infinity) > (a.reward ?? -Infinity) ? b : a));
    const worst = members.reduce((a, b) => ((b.reward ?? Infinity) < (a.reward ?? Infinity) ? b : a));
    const right = members.filter((one) => one.correct).length;
    return el(
      "tr",
      { class: round === row.round ? "here" : null },
      el("td", { class: "num" }, round),
      el("td", { class: "num" }, `${right} of ${members.length}`),
      el("td", { class: "cut" }, visible((best.text ?? "").slice(0, 160))),
      el("td", { class: "cut" }, worst.reward === best.reward ? "" : visible((worst.text ?? "").slice(0, 160))),
    );
  });
  const names = ["round", "right", "best", "worst"];
  const header = el("tr", {}, names.map((name, i) => el("th", { class: i < 2 ? "num" : null }, name)));
  const whole = el("table", { class: "strip" }, el("thead", {}, header), el("tbody", {}, lines));
  return el("details", {}, el("summary", {}, "What it answered, round by round"), el("div", { class: "scroll" }, whole));
}
