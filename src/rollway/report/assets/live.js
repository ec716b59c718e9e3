// `rollway serve`: asks whether the folder has changed, and says so without taking the page away.

import { button, el, find } from "./dom.js";

const EVERY = 3000;

export function watch() {
  const bar = el("p", { class: "live", role: "status" }, "live");
  find("#tools").append(bar);
  let first = null;
  const ask = async () => {
    try {
      const answer = await fetch("version", { cache: "no-store" });
      const { version } = await answer.json();
      first ??= version;
      if (version !== first) {
        bar.replaceChildren(button("New results: load them", () => window.location.reload(), { class: "fresh" }));
        return;
      }
      bar.textContent = "live";
    } catch {
      bar.textContent = "the server has stopped";
    }
    setTimeout(ask, EVERY);
  };
  ask();
}
