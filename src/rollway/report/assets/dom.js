// Elements and text. Nothing in this page sets innerHTML: what a model wrote only ever becomes a text node.

const SVG = "http://www.w3.org/2000/svg";
const INVISIBLE = /[\p{Cc}\p{Cf}\p{Co}\p{Cn}\p{Cs}\p{Zl}\p{Zp}]/gu;

export function find(selector, root = document) {
  return root.querySelector(selector);
}

/** An element with attributes (`on`: handlers by event) and children: elements, texts, or null for nothing. */
export function el(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

export function svg(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function filled(element, { on = {}, ...attributes }, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  for (const [event, handler] of Object.entries(on)) element.addEventListener(event, handler);
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return element;
}

/** Control characters and other invisible ones as escapes, so that nothing in a completion hides. */
export function visible(text) {
  return String(text).replace(INVISIBLE, (c) => (c === "\n" || c === "\t" ? c : escaped(c.codePointAt(0))));
}

function escaped(code) {
  if (code < 256) return `\\x${code.toString(16).padStart(2, "0")}`;
  return code < 65536 ? `\\u${code.toString(16).padStart(4, "0")}` : `\\U${code.toString(16).padStart(8, "0")}`;
}

export function replace(element, ...children) {
  element.replaceChildren(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return element;
}

/** A number for people: four significant digits, thousands separated; a dash where there is none. */
export function short(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "-";
  if (Number.isInteger(value)) return value.toLocaleString("en");
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2);
  return String(Number(value.toPrecision(4)));
}

export function signed(value) {
  if (value === null || value === undefined) return "-";
  return (value > 0 ? "+" : "") + short(value);
}

export function seconds(value) {
  if (value < 100) return `${value.toFixed(1)} s`;
  return value < 6000 ? `${(value / 60).toFixed(1)} min` : `${(value / 3600).toFixed(1)} h`;
}

/** A line of small print; the text may be a model's. */
export function note(text) {
  return el("p", { class: "note" }, visible(text));
}

/** A whole number with its thousands apart. */
export function count(value) {
  return value.toLocaleString("en");
}

/** The stroke of a line's colour. */
export function swatch(number) {
  return el("i", { class: `swatch s${number}` });
}

/** Options that are called what they are. */
export function named(values) {
  return values.map((value) => [value, value]);
}

/** A labelled choice. options: [[value, text]]. */
export function choice(label, options, value, change, attributes = {}) {
  const select = el(
    "select",
    { on: { change: (event) => change(event.target.value) }, ...attributes },
    options.map(([key, text]) => el("option", { value: key, selected: String(key) === String(value) }, visible(text))),
  );
  return el("label", { class: "field" }, el("span", {}, label), select);
}

/** A labelled input. A number is taken when it is whole: halfway ("0.") it would be lost. */
export function field(label, attributes, change) {
  const event = attributes.type === "number" ? "change" : "input";
  const input = el("input", { on: { [event]: (given) => change(given.target.value) }, ...attributes });
  return el("label", { class: "field" }, el("span", {}, label), input);
}

export function button(text, click, attributes = {}) {
  return el("button", { type: "button", on: { click }, ...attributes }, text);
}

/** A table from a header and rows of texts or elements; `numeric` columns are set to the right. */
export function table(header, rows, numeric = []) {
  const side = (i) => (numeric.includes(i) ? "num" : null);
  return el(
    "div",
    { class: "scroll", tabindex: "0" },
    el(
      "table",
      {},
      el("thead", {}, el("tr", {}, header.map((cell, i) => el("th", { class: side(i), scope: "col" }, cell)))),
      el("tbody", {}, rows.map((row) => el("tr", {}, row.map((cell, i) => el("td", { class: side(i) }, cell))))),
    ),
  );
}
