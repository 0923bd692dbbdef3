// Functions that build DOM elements from plain data. All text is inserted as text; no API data is parsed as HTML.

const SVG = "http://www.w3.org/2000/svg";

/** An element: `on…` properties are listeners, true and false set and leave out an attribute, the rest are attributes. */
export function h(name, properties = {}, ...children) {
  return fill(document.createElement(name), properties, children);
}

/** The same for SVG. */
export function s(name, properties = {}, ...children) {
  return fill(document.createElementNS(SVG, name), properties, children);
}

function fill(element, properties, children) {
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.flat(Infinity).filter((child) => child != null && child !== false));
  return element;
}

/** Tell people who do not see the page what has changed. */
export function announce(text) {
  document.getElementById("status").textContent = text;
}

/** A table; rows are lists of cells, each text or an element. The first column heads its row. */
export function table(caption, heads, rows, numeric = () => true) {
  const cell = (content, at) =>
    h(at ? "td" : "th", { scope: at ? null : "row", class: at && numeric(at) ? "number" : null, "data-label": heads[at] }, content);
  return h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
    h("table", {},
      h("caption", { class: "visually-hidden" }, caption),
      h("thead", {}, h("tr", {}, heads.map((head, at) => h("th", { scope: "col", class: at && numeric(at) ? "number" : null }, head)))),
      h("tbody", {}, rows.map((row) => h("tr", {}, row.map(cell))))));
}

const whole = new Intl.NumberFormat("en");

export const number = (value) => (value == null ? "–" : whole.format(value));
export const fixed = (value, digits = 2) => (value == null ? "–" : value.toFixed(digits));
export const percent = (value, digits = 1) => (value == null ? "–" : `${(100 * value).toFixed(digits)} %`);
export const megabytes = (value) => (value == null ? "–" : `${fixed(value / 1e6, 1)} MB`);
export const perplexity = (value) => (value == null ? "infinite" : fixed(value));

/** Seconds in words, as `1 h 05 min`, `3 min 20 s`, `12 s`. */
export function duration(seconds) {
  const left = Math.max(Math.round(seconds), 0);
  const [hours, minutes] = [Math.floor(left / 3600), Math.floor((left % 3600) / 60)];
  if (hours) return `${hours} h ${String(minutes).padStart(2, "0")} min`;
  return minutes ? `${minutes} min ${left % 60} s` : `${left} s`;
}

export function time(text) {
  if (!text) return "–";
  const when = new Date(text);
  return h("time", { datetime: text, title: when.toString() }, when.toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "medium" }));
}
