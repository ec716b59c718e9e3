// The keyboard, and the sheet that explains it.

import { button, el, find } from "./dom.js";
import { closeDetail, step, turnRound } from "./rollouts.js";
import { change, state } from "./state.js";

const SHEET = [
  ["1 to 7", "the views, from left to right"],
  ["j, k or down, up", "next and previous rollout"],
  ["left, right", "earlier and later round"],
  ["/", "search in prompts and completions"],
  ["c", "next colouring of tokens"],
  ["Escape", "leave a field; on a phone, back to the list"],
  ["t", "light, dark, or as the system says"],
  ["?", "this sheet"],
];

export function helpSheet() {
  const rows = SHEET.map(([keys, meaning]) => el("tr", {}, el("td", {}, el("kbd", {}, keys)), el("td", {}, meaning)));
  const close = button("Close", () => sheet.close());
  const sheet = el("dialog", { id: "help" }, el("h2", {}, "Keys"), el("table", {}, el("tbody", {}, rows)), close);
  return sheet;
}

export function listen(pages, nextTheme) {
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = event.target.closest?.("input, select, textarea");
    if (typing) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    if (act(event.key, pages, nextTheme)) event.preventDefault();
  });
}

function act(key, pages, nextTheme) {
  if (/^[1-9]$/.test(key) && pages[Number(key) - 1]) return done(() => change({ page: pages[Number(key) - 1] }));
  if (key === "?") return done(() => find("#help").showModal());
  if (key === "t") return done(nextTheme);
  if (state().page !== "rollouts") return false;
  switch (key) {
    case "j":
    case "ArrowDown":
      return done(() => step(1));
    case "k":
    case "ArrowUp":
      return done(() => step(-1));
    case "ArrowLeft":
      return done(() => turnRound(-1));
    case "ArrowRight":
      return done(() => turnRound(1));
    case "/":
      return done(() => find("#search")?.focus());
    case "c":
      return done(nextColour);
    case "Escape":
      return done(closeDetail);
    default:
      return false;
  }
}

function nextColour() {
  const select = find("#colour");
  if (!select) return;
  select.selectedIndex = (select.selectedIndex + 1) % select.options.length;
  select.dispatchEvent(new Event("change"));
}

function done(action) {
  action();
  return true;
}
