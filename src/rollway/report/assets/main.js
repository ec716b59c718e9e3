// Starts the page: reads the summary, makes the tabs, draws the view that the address names.

import { button, el, find, replace } from "./dom.js";
import { readSummary } from "./data.js";
import { change, onChange, readAddress, remember, remembered, state } from "./state.js";
import { redraw, sweep } from "./charts.js";
import { drawOverview } from "./overview.js";
import { drawCurves } from "./curves.js";
import { drawRollouts } from "./rollouts.js";
import { drawCompare } from "./compare.js";
import { drawHealth } from "./health.js";
import { drawCost } from "./cost.js";
import { drawRuns } from "./runs.js";
import { helpSheet, listen } from "./keys.js";
import { watch } from "./live.js";

const VIEWS = {
  overview: ["Overview", drawOverview],
  curves: ["Curves", drawCurves],
  rollouts: ["Rollouts", drawRollouts],
  compare: ["Compare", drawCompare],
  health: ["Health", drawHealth],
  cost: ["Time", drawCost],
  runs: ["Runs", drawRuns],
};
const THEMES = ["auto", "light", "dark"];
const PAGES = Object.keys(VIEWS);

async function begin() {
  setTheme(remembered("theme") || "auto");
  const data = await readSummary();
  for (const page of PAGES.slice(1)) find("#main").append(el("section", { id: `view-${page}`, class: "view" }));
  document.body.append(helpSheet());
  find("#tools").append(
    button("Theme", nextTheme, { id: "theme", title: "light, dark, or as the system says (t)" }),
    button("?", () => find("#help").showModal(), { title: "keys", "aria-label": "Keys" }),
  );
  const show = () => draw(data);
  onChange(show);
  window.addEventListener("hashchange", () => {
    readAddress();
    show();
  });
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  listen(PAGES, nextTheme);
  readAddress();
  await show();
  if (data.live) watch();
  document.documentElement.dataset.ready = "yes";
}

async function draw(data) {
  const page = VIEWS[state().page] ? state().page : "overview";
  const tabs = PAGES.map((name, i) =>
    button(VIEWS[name][0], () => change({ page: name }), {
      "aria-current": name === page ? "page" : null,
      "data-page": name,
      title: `key ${i + 1}`,
    }),
  );
  replace(find("#tabs"), tabs);
  const current = tabs[PAGES.indexOf(page)];
  find("#tabs").scrollLeft = current.offsetLeft - find("#tabs").offsetLeft - 40;
  for (const name of PAGES) find(`#view-${name}`).hidden = name !== page;
  await VIEWS[page][1](find(`#view-${page}`), data);
  sweep();
}

function setTheme(theme) {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  remember("theme", theme);
  redraw();
}

function nextTheme() {
  const now = document.documentElement.dataset.theme || "auto";
  setTheme(THEMES[(THEMES.indexOf(now) + 1) % THEMES.length]);
}

begin().catch((error) => {
  document.documentElement.dataset.ready = "failed";
  const words = `This page could not be drawn: ${error.message}. It needs a browser of 2023 or later.`;
  find("#main").prepend(el("p", { class: "notice" }, words));
  throw error;
});
