// What is looked at, kept in the address after # so that a link or a reload leads to the same place.

const listeners = [];
let current = { page: "overview" };

export function state() {
  return current;
}

/** Changes what is given; null removes. Views are drawn again unless `quiet`. */
export function change(changes, quiet = false) {
  const next = { ...current, ...changes };
  for (const key of Object.keys(next)) if (next[key] === null || next[key] === "") delete next[key];
  const moved = next.page !== current.page;
  current = next;
  write(moved);
  if (!quiet) for (const listener of listeners) listener(current, moved);
}

export function onChange(listener) {
  listeners.push(listener);
}

export function readAddress() {
  current = addressOf(window.location.hash);
  return current;
}

/** What stands after #, as `write` puts it there. URLSearchParams decodes, once, and takes any text. */
export function addressOf(hash) {
  const [page, ...rest] = hash.replace(/^#/, "").split("?");
  return { ...Object.fromEntries(new URLSearchParams(rest.join("?"))), page: page || "overview" };
}

/** Pages inside another page (snakemake --report) may have no address of their own: then it is not kept. */
function write(moved) {
  const { page, ...rest } = current;
  const query = new URLSearchParams(rest).toString();
  const address = `#${page}${query ? `?${query}` : ""}`;
  try {
    if (moved) window.history.pushState(null, "", address);
    else window.history.replaceState(null, "", address);
  } catch {
    // Nothing is lost but the link.
  }
}

/** A preference that outlives the page where the browser lets it. */
export function remembered(name) {
  try {
    return window.localStorage.getItem(`rollway-${name}`);
  } catch {
    return null;
  }
}

export function remember(name, value) {
  try {
    window.localStorage.setItem(`rollway-${name}`, value);
  } catch {
    // Nothing is lost but the preference.
  }
}
