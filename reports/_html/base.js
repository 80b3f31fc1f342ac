"use strict";

// Names in a report come from model files and engines and are untrusted. They reach the page as
// text nodes and as values of title and aria-* attributes, never as markup, address or style.
const { report: REPORT, words: WORDS } = JSON.parse(document.getElementById("data").textContent);

// --- elements -----------------------------------------------------------------------------------

const SVG = "http://www.w3.org/2000/svg";

/** An HTML element; functions among the attributes listen to the event of that name. */
const html = (tag, attributes, ...children) =>
  fill(document.createElement(tag), attributes, children);

/** An SVG element. */
const svg = (tag, attributes, ...children) =>
  fill(document.createElementNS(SVG, tag), attributes, children);

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") element.addEventListener(name, value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children.flat(Infinity)) {
    if (child !== null && child !== undefined && child !== false) element.append(child);
  }
  return element;
}

/** A definition list without the terms whose description is empty. */
function facts(...pairs) {
  const said = pairs.filter(([, ...description]) => description.flat().some(Boolean));
  return html("dl", { class: "facts" }, said.map(([term, ...description]) =>
    html("div", null, html("dt", null, term), html("dd", null, ...description))));
}

/** A folded part of the page, drawn when it is first opened. */
function folded(summary, draw) {
  let drawn = false;
  const element = html("details", {
    toggle: () => {
      if (element.open && !drawn) element.append(draw());
      drawn ||= element.open;
    },
  }, html("summary", null, summary));
  return element;
}

/** A list of which the first items show and the others unfold. */
function listed(items, shown) {
  const list = (some) => html("ul", null, some.map((item) => html("li", null, item)));
  if (items.length <= shown + 1) return list(items);
  const rest = items.slice(shown);
  return [list(items.slice(0, shown)), folded(`${rest.length} more`, () => list(rest))];
}

/** A horizontal bar; `share` is clamped to 0..1, `text` says it to those who cannot see it. */
function bar(share, text) {
  const inner = html("span");
  inner.style.inlineSize = `${100 * Math.min(Math.max(share ?? 0, 0), 1)}%`;
  return html("span", { class: "bar", role: "img", "aria-label": text }, inner);
}

/** A table that scrolls sideways by itself where the window is narrow. */
function table(caption, head, rows) {
  const cell = (content, i) => {
    const attributes = { class: head[i].number ? "number" : null, "data-label": head[i].title };
    return html("td", attributes, content);
  };
  return html("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
    html("table", null,
      html("thead", null, html("tr", null, head.map(({ title, number }) =>
        html("th", { scope: "col", class: number ? "number" : null }, title)))),
      html("tbody", null, rows.map((row) => html("tr", null, row.map(cell))))));
}

const code = (text, most = 160) => html("code", null, clip(text, most));

// --- figures, as in the other formats ---------------------------------------------------------------

const NONE = "-";

/** A relative error with two significant digits; null is infinite. */
function error(value) {
  if (value === null) return "n/a";
  if (value === 0) return "0";
  const [mantissa, exponent] = value.toExponential(1).split("e");
  return `${mantissa}e${Number(exponent)}`;
}

/** Any number with three significant digits; null is unknown. */
function plain(value) {
  if (value === null) return NONE;
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "-∞";
  if (value === 0) return "0";
  const [mantissa, exponent] = value.toExponential(2).split("e");
  if (exponent >= -4 && exponent < 3) return String(Number(value.toPrecision(3)));
  return `${Number(mantissa)}e${Number(exponent)}`;
}

/** How many times. */
function times(ratio) {
  return `${ratio >= 1e3 && ratio < 1e6 ? Math.round(ratio).toLocaleString("en") : plain(ratio)} times`;
}

/** A share in per cent; never rounded up to 100% or down to 0%; null was not measured. */
function percent(share) {
  if (share === null) return NONE;
  const value = 100 * share;
  const size = Math.abs(value);
  if (size >= 1e5) return `${plain(value)}%`;
  if (size === 0 || size >= 100) return `${value.toFixed(0)}%`;
  if (size < 0.01) return "<0.01%";
  if (size >= 99.95) return `${(Math.trunc(value * 100) / 100).toFixed(2)}%`;
  return size < 0.995 ? `${value.toFixed(2)}%` : `${value.toFixed(1)}%`;
}

/** A share explained as a score, never rounded up to 1; null is minus infinite. */
function score(explained) {
  if (explained === null) return "-∞";
  if (Math.abs(explained) >= 10) return plain(explained);
  return (Math.floor(explained * 1e4) / 1e4).toFixed(4);
}

const count = (number, what) => `${number.toLocaleString("en")} ${what}${number === 1 ? "" : "s"}`;
const dims = (shape) => shape.join("×") || "scalar";
const seconds = (value) => (value === null ? NONE : `${value.toFixed(value < 10 ? 2 : 1)} s`);

/** How a number varied over samples; empty where it rests on one. */
function ranged(spread, figure) {
  if (!spread || spread.samples < 2) return "";
  return `${figure(spread.low)} to ${figure(spread.high)} over ${spread.samples} samples`;
}

/** A text of at most `most` characters, its middle left out: names differ at their ends. */
function clip(text, most = 160) {
  if (text.length <= most) return text;
  const head = Math.floor(((most - 1) * 2) / 5);
  return `${text.slice(0, head)}…${text.slice(text.length - (most - 1 - head))}`;
}

/** Operators that move or convert values: named only where a segment has no others. */
const PLUMBING = new Set(["Cast", "Concat", "DequantizeLinear", "Expand", "Flatten", "Identity",
  "QuantizeLinear", "Reshape", "Shape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"]);

/** The operators a segment is known by, in about `most` characters: `Conv + Clip + 3 more`. */
function operators(segment, most) {
  const all = [...new Set(segment.op_types)];
  const telling = all.filter((op) => !PLUMBING.has(op));
  const names = telling.length ? telling : all;
  let said = clip(names[0] ?? NONE, most);
  for (let i = 1; i < names.length; i++) {
    const longer = `${said} + ${names[i]}`;
    if (longer.length > most) return `${said} + ${names.length - i}`;
    said = longer;
  }
  return said;
}

// --- what is wrong, and how badly -------------------------------------------------------------------

const HOTTEST = 6;
const HEAT = { critical: 6, high: 5, medium: 4, low: 2, info: 0 };

/** Step of the heat ramp for a relative error: one a decade, from 1e-6 to 0.1. */
function heat(value) {
  if (value === null) return HOTTEST;
  if (value < 1e-6) return 0;
  return Math.min(Math.floor(Math.log10(value) + 1e-9) + 7, HOTTEST);
}

const SHARES = [0, 0.001, 0.01, 0.03, 0.1, 0.3];

/** Step of the heat ramp for a share of the final divergence. */
const shareHeat = (share) =>
  (share === null ? 0 : SHARES.filter((from) => Math.abs(share) > from).length);

const severity = (word) =>
  html("span", { class: "severity" }, html("i", { class: `swatch h${HEAT[word]}` }), word);

const flagged = (segment) =>
  segment.introduced === null || segment.introduced > (segment.floor ?? Infinity);

/** The segment's cause in a word or two. */
function cause(segment) {
  if (segment.unmeasured !== null) return "not measured";
  if (flagged(segment)) return segment.noise ?? "unexplained";
  return "below its floor";
}

/** The finding that a segment belongs to, if any. */
const FINDINGS = new Map();
for (const finding of REPORT.findings) {
  for (const id of finding.segments) {
    const key = JSON.stringify([finding.backend, id]);
    if (!FINDINGS.has(key)) FINDINGS.set(key, finding);
  }
}
const findingOf = (backend, segment) => FINDINGS.get(JSON.stringify([backend.id, segment.id]));
