// Tokens with a colour each, by what is known of them.

import { count, el, visible } from "./dom.js";

const FIRST = 400;

export const CHANNELS = [
  ["logp", "log-prob"],
  ["entropy", "entropy"],
  ["advantage", "advantage"],
  ["ratio", "policy ratio"],
  ["none", "plain text"],
];

/** How each channel becomes a number in [0, 1] (hot) or [-1, 1] (hot and cold), and what its ends mean. Roots: most
 * tokens are nearly certain, and their differences should be seen too. */
const SCALES = {
  logp: { size: (v) => Math.sqrt(Math.max(0, -v) / 5), ends: ["certain (0 nats)", "surprising (-5 nats or less)"] },
  entropy: { size: (v) => Math.sqrt(Math.max(0, v) / 3), ends: ["0 nats", "3 nats or more"] },
  advantage: { size: (v, most) => v / (most || 1), ends: ["held back", "pushed up"] },
  ratio: { size: (v) => Math.log(v), ends: ["less likely later", "more likely later"] },
};

export function legendOf(channel) {
  if (channel === "none") return null;
  const both = channel === "advantage" || channel === "ratio";
  const [low, high] = SCALES[channel].ends;
  return el("span", { class: "scale" }, low, el("i", { class: both ? "ramp both" : "ramp" }), high);
}

/** Values of a channel, one per shown token; null where nobody knows. */
export function valuesOf(row, channel, reference) {
  const none = new Array(row.tokens.length).fill(null);
  switch (channel) {
    case "logp":
      return row.logp;
    case "entropy":
      return row.entropy || none;
    case "advantage":
      if (row.tokenAdvantage) return row.tokenAdvantage;
      return none.map((_, i) => (row.mask && !row.mask[i] ? null : row.advantage ?? null));
    case "ratio":
      return reference ? ratiosOf(row, reference) : none;
    default:
      return none;
  }
}

/** How many tokens two completions of one prompt begin with in common. */
export function commonPrefix(a, b) {
  const most = Math.min(a.length, b.length);
  let i = 0;
  while (i < most && a[i] === b[i]) i += 1;
  return i;
}

/**
 * Another policy's completion that begins like this one: of those that know the most log-probs of the common beginning,
 * the longest beginning, and of the latest policy. There both log-probs are of the same tokens after the same context.
 */
export function referenceOf(row, rows) {
  let best = null;
  for (const other of rows) {
    if (other.prompt !== row.prompt || other.policy === row.policy || cut(other) || cut(row)) continue;
    const shared = commonPrefix(row.tokens, other.tokens);
    const known = row.logp.slice(0, shared).filter((value, i) => value !== null && other.logp[i] !== null).length;
    const found = { row: other, shared, known };
    if (known && (!best || better(found, best))) best = found;
  }
  return best;
}

function better(one, other) {
  if (one.known !== other.known) return one.known > other.known;
  if (one.shared !== other.shared) return one.shared > other.shared;
  return one.row.policy > other.row.policy;
}

const cut = (row) => row.tokens.length < row.length;

/** exp(later log-prob - earlier log-prob), in the common beginning. */
function ratiosOf(row, { row: other, shared }) {
  const later = other.policy > row.policy ? 1 : -1;
  return row.tokens.map((_, i) => {
    if (i >= shared || row.logp[i] === null || other.logp[i] === null) return null;
    return Math.exp(later * (other.logp[i] - row.logp[i]));
  });
}

/** The completion; `most`: the largest advantage of its group. Without a tokenizer, ids stand for tokens. */
export function tokenText(row, pieces, channel, { reference = null, most = 1, head = 1000 } = {}) {
  if (channel === "none" || !row.tokens.length) return el("div", { class: "text" }, visible(row.text ?? ""));
  const values = valuesOf(row, channel, reference);
  const box = el("div", { class: "text tokens" });
  const show = (start, end) => {
    for (let i = start; i < end; i += 1) {
      if (i === head && cut(row)) {
        const left = count(row.length - row.tokens.length);
        box.append(el("span", { class: "gap" }, ` ... ${left} tokens are not shown ... `));
      }
      box.append(token(row, i, pieces, values[i], channel, most));
    }
  };
  show(0, Math.min(FIRST, row.tokens.length));
  if (row.tokens.length > FIRST) {
    const rest = el("button", { type: "button", class: "rest" }, `${row.tokens.length - FIRST} more tokens`);
    rest.addEventListener("click", () => {
      rest.remove();
      show(FIRST, row.tokens.length);
    });
    box.append(rest);
  }
  return box;
}

function token(row, i, pieces, value, channel, most) {
  const piece = pieces ? visible(pieces[row.tokens[i]] ?? `<${row.tokens[i]}>`) : `<${row.tokens[i]}>`;
  const span = el("span", { class: "tok", "data-i": i }, piece || "\u2205");
  if (value === null || value === undefined) span.classList.add("unknown");
  else {
    const size = Math.max(-1, Math.min(1, SCALES[channel].size(value, most)));
    span.classList.add(size < 0 ? "cold" : "hot");
    span.style.setProperty("--size", `${Math.round(Math.abs(size) * 75)}%`);
  }
  if (row.mask && !row.mask[i]) span.classList.add("given");
  return span;
}

/** One line about a token, for the line below the completions. */
export function aboutToken(row, i, pieces, reference) {
  const facts = [`token ${i}`, `id ${row.tokens[i]}`];
  if (pieces) facts.push(JSON.stringify(visible(pieces[row.tokens[i]] ?? "")));
  const add = (name, value, digits = 3) => {
    if (value !== null && value !== undefined) facts.push(`${name} ${value.toFixed(digits)}`);
  };
  add("log-prob", row.logp[i]);
  if (row.logp[i] !== null) add("prob", Math.exp(row.logp[i]), 4);
  add("entropy", row.entropy?.[i]);
  add("advantage", valuesOf(row, "advantage")[i]);
  if (reference) add(`ratio of round ${reference.row.policy} and ${row.policy}`, ratiosOf(row, reference)[i]);
  if (row.mask && !row.mask[i]) facts.push("not written by the policy");
  return facts.join("  \u00b7  ");
}
