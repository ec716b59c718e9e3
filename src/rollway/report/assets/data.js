// The data in the page: gzip in base64, unpacked when it is needed.

const parts = new Map();

async function unpacked(element) {
  const text = atob(element.textContent.trim());
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i += 1) bytes[i] = text.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

/** What every view needs. Prompts lose what JSON calls __proto__: they are looked up by id. */
export async function readSummary() {
  const summary = await unpacked(document.getElementById("data-summary"));
  summary.prompts = new Map(Object.entries(summary.prompts));
  summary.byRun = new Map(summary.runs.map((run) => [run.run, run]));
  return summary;
}

/** Rollouts and held-out samples of a run: {rollouts: [row], samples: [row], pieces: id -> text or null}. */
export function readPart(run, unknown) {
  if (!parts.has(run)) {
    const element = [...document.querySelectorAll("script.part")].find((one) => one.dataset.run === run);
    const empty = { rollouts: [], samples: [], pieces: null };
    parts.set(run, element ? unpacked(element).then((part) => prepared(run, part, unknown)) : Promise.resolve(empty));
  }
  return parts.get(run);
}

function prepared(run, part, unknown) {
  const found = { pieces: part.pieces };
  for (const kind of ["rollouts", "samples"]) {
    found[kind] = part[kind] ? rowsOf(run, kind, part[kind], unknown) : [];
  }
  return found;
}

/** One object per row, with its own part of the token lists. */
export function rowsOf(run, kind, columns, unknown) {
  const { shown, tokens, logp, entropy, mask, scores = {}, parts: pieces = {}, token_advantage = {}, ...plain } = columns;
  const names = Object.entries(plain);
  const scored = Object.entries(scores);
  const known = (list, start, end) => list.slice(start, end).map((v) => (Math.abs(v) === unknown ? null : v / 100));
  let end = 0;
  return shown.map((count, i) => {
    const start = end;
    end += count;
    const row = { run, kind, place: i, scores: {}, parts: pieces[i] || [], tokenAdvantage: token_advantage[i] || null };
    for (const [name, values] of names) row[name] = values[i];
    for (const [name, values] of scored) row.scores[name] = values[i];
    row.group = row.group ?? `${row.round} ${row.prompt}`;
    row.policy = row.policy_round ?? row.round;
    row.tokens = tokens.slice(start, end);
    row.logp = known(logp, start, end);
    row.entropy = entropy ? known(entropy, start, end) : null;
    row.mask = mask ? mask.slice(start, end) : null;
    return row;
  });
}
