// Which rollouts, in which order: pure functions of rows and of what the reader asked for.

export const SORTS = [
  ["order", "round and prompt"],
  ["-reward", "highest reward"],
  ["reward", "lowest reward"],
  ["-advantage", "highest advantage"],
  ["advantage", "lowest advantage"],
  ["-length", "longest"],
  ["length", "shortest"],
  ["finish", "how they ended"],
  ["logp", "least likely (mean log-prob)"],
  ["-spread", "groups that disagree most"],
];

/** Orders by the reward of each scorer: its name follows `score:`. */
export function sortsOf(scorers) {
  return scorers.flatMap((name) => [
    [`-score:${name}`, `highest ${name}`],
    [`score:${name}`, `lowest ${name}`],
  ]);
}

/** Rows that satisfy the query, sorted. `wording`: prompt id -> its text in lower case. */
export function selected(rows, query, wording) {
  const found = rows.filter((row) => accepted(row, query, wording));
  return sorted(found, query.sort || "order", rows);
}

function accepted(row, query, wording) {
  if (query.round !== undefined && query.round !== "all" && row.round !== Number(query.round)) return false;
  if (query.finish && row.finish !== query.finish) return false;
  if (query.right === "right" && row.correct !== true) return false;
  if (query.right === "wrong" && row.correct !== false) return false;
  if (query.source && row.source !== query.source) return false;
  if (query.used === "yes" && !row.slots) return false;
  if (query.used === "no" && row.slots) return false;
  if (!within(query.scorer ? row.scores[query.scorer] : row.reward, query.low, query.high)) return false;
  if (!within(row.advantage, query.advantageLow, query.advantageHigh)) return false;
  if (!within(row.length, query.shortest, query.longest)) return false;
  if (!query.text) return true;
  const text = query.text.toLowerCase();
  return `${row.text ?? ""}\n${wording(row.prompt)}\n${row.id ?? ""}`.toLowerCase().includes(text);
}

function within(value, low, high) {
  const ends = [low, high].map((end) => (end === undefined || end === "" || Number.isNaN(Number(end)) ? null : Number(end)));
  if (ends[0] === null && ends[1] === null) return true;
  if (value === null || value === undefined) return false;
  return (ends[0] === null || value >= ends[0]) && (ends[1] === null || value <= ends[1]);
}

function sorted(rows, sort, all) {
  if (sort === "order") return rows;
  const falling = sort.startsWith("-");
  const key = keyOf(falling ? sort.slice(1) : sort, all);
  return rows
    .map((row) => [key(row), row])
    .sort(([a, one], [b, other]) => compared(a, b, falling) || one.place - other.place)
    .map(([, row]) => row);
}

/** Numbers by size, texts by letter; what has no value comes last in either direction. */
function compared(a, b, falling) {
  const [none, nothing] = [a, b].map((value) => value === null || value === undefined || Number.isNaN(value));
  if (none || nothing) return none - nothing;
  if (a === b) return 0;
  return a < b === falling ? 1 : -1;
}

function keyOf(name, all) {
  if (name === "logp") return meanLogprob;
  if (name.startsWith("score:")) return (row) => row.scores[name.slice("score:".length)];
  if (name !== "spread") return (row) => row[name];
  const groups = groupsOf(all);
  const spreads = new Map([...groups].map(([key, rows]) => [key, deviation(rows.map((row) => row.reward ?? 0))]));
  return (row) => spreads.get(keyOfGroup(row));
}

export function meanLogprob(row) {
  const known = row.logp.filter((value) => value !== null);
  return known.length ? known.reduce((a, b) => a + b, 0) / known.length : null;
}

function deviation(values) {
  const mean = values.reduce((a, b) => a + b, 0) / values.length;
  return Math.sqrt(values.reduce((a, b) => a + (b - mean) ** 2, 0) / values.length);
}

export function keyOfGroup(row) {
  return `${row.round}|${row.group}`;
}

export function groupsOf(rows) {
  const groups = new Map();
  for (const row of rows) {
    const key = keyOfGroup(row);
    if (!groups.has(key)) groups.set(key, []);
    groups.get(key).push(row);
  }
  return groups;
}

/** Round -> rows, of one prompt. */
export function roundsOf(rows, prompt) {
  const rounds = new Map();
  for (const row of rows) {
    if (row.prompt === prompt) rounds.set(row.round, [...(rounds.get(row.round) || []), row]);
  }
  return new Map([...rounds].sort(([a], [b]) => a - b));
}
