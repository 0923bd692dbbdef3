// Small SVG charts (lines, bars and points). Each chart also shows its numbers as a table, for readers who cannot see it.

import { h, s, table } from "./dom.js";

const [WIDTH, HEIGHT] = [520, 240];
const MARGIN = { left: 56, right: 14, top: 12, bottom: 40 };
const INNER = { width: WIDTH - MARGIN.left - MARGIN.right, height: HEIGHT - MARGIN.top - MARGIN.bottom };
const TICKS = 5;

/** Numbers round in the decimal system that span [low, high]. */
function ticks(low, high) {
  const span = high - low || Math.abs(high) || 1;
  const power = 10 ** Math.floor(Math.log10(span / TICKS));
  const step = power * ([1, 2, 5, 10].find((factor) => span / (factor * power) <= TICKS) ?? 10);
  const first = Math.floor(low / step) * step;
  const count = Math.max(Math.ceil((high - first) / step - 1e-9), 1);
  return Array.from({ length: count + 1 }, (_, at) => first + at * step);
}

const short = (value) => {
  const size = Math.abs(value);
  if (size >= 1e9) return `${+(value / 1e9).toFixed(2)}G`;
  if (size >= 1e6) return `${+(value / 1e6).toFixed(2)}M`;
  if (size >= 1e4) return `${+(value / 1e3).toFixed(1)}k`;
  return String(+value.toPrecision(4));
};

/** Axes and grid around `draw(x, y)`, which maps numbers to the plane. */
function frame({ title, xLabel, yLabel, xs, ys, draw, legend = [], rows, heads }) {
  const [xTicks, yTicks] = [ticks(Math.min(...xs), Math.max(...xs)), ticks(Math.min(...ys), Math.max(...ys))];
  const scale = (values, length) => (value) => ((value - values[0]) / (values.at(-1) - values[0])) * length;
  const across = scale(xTicks, INNER.width);
  const up = scale(yTicks, INNER.height);
  const x = (value) => MARGIN.left + across(value);
  const y = (value) => MARGIN.top + INNER.height - up(value);
  const svg = s("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": `${title}. The numbers follow as a table.` },
    yTicks.map((value) => [
      s("line", { class: "grid", x1: MARGIN.left, x2: WIDTH - MARGIN.right, y1: y(value), y2: y(value) }),
      s("text", { x: MARGIN.left - 6, y: y(value) + 4, "text-anchor": "end" }, short(value)),
    ]),
    xTicks.map((value) => s("text", { x: x(value), y: HEIGHT - MARGIN.bottom + 16, "text-anchor": "middle" }, short(value))),
    s("line", { class: "axis", x1: MARGIN.left, x2: WIDTH - MARGIN.right, y1: y(yTicks[0]), y2: y(yTicks[0]) }),
    s("text", { class: "label", x: MARGIN.left + INNER.width / 2, y: HEIGHT - 6, "text-anchor": "middle" }, xLabel),
    s("text", { class: "label", transform: `translate(12 ${MARGIN.top + INNER.height / 2}) rotate(-90)`, "text-anchor": "middle" }, yLabel),
    draw(x, y));
  return h("figure", {},
    h("figcaption", {}, title,
      legend.length > 1 && h("span", { class: "legend" }, legend.map((name, at) => h("span", { class: `key series-${at}` }, name)))),
    svg,
    h("details", {}, h("summary", {}, "Numbers"), table(title, heads, rows)));
}

/** `series`: [{name, points: [[x, y], …]}]. */
export function lineChart({ title, xLabel, yLabel, series, fromZero = false }) {
  const points = series.flatMap((line) => line.points);
  const xs = [...new Set(points.map(([x]) => x))].sort((a, b) => a - b);
  return frame({
    title, xLabel, yLabel, xs,
    ys: [...points.map(([, y]) => y), ...(fromZero ? [0] : [])],
    legend: series.map((line) => line.name),
    heads: [xLabel, ...series.map((line) => line.name)],
    rows: xs.map((at) => [short(at), ...series.map((line) => short(line.points.find(([x]) => x === at)?.[1] ?? NaN))]),
    draw: (x, y) => series.map((line, at) => [
      s("polyline", { class: `line series-${at}`, points: line.points.map((point) => `${x(point[0])},${y(point[1])}`).join(" ") }),
      line.points.length <= 40 && line.points.map((point) => s("circle", { class: `dot series-${at}`, cx: x(point[0]), cy: y(point[1]), r: 3 },
        s("title", {}, `${line.name}: ${short(point[1])}`))),
    ]),
  });
}

/** Bars by layer; `series`: [{name, values}], later ones in front of earlier. */
export function barChart({ title, yLabel, series }) {
  const count = series[0].values.length;
  const layers = Array.from({ length: count }, (_, at) => at);
  return frame({
    title, xLabel: "layer", yLabel,
    xs: [0, count],
    ys: [0, ...series.flatMap((bars) => bars.values)],
    legend: series.map((bars) => bars.name),
    heads: ["layer", ...series.map((bars) => bars.name)],
    rows: layers.map((at) => [String(at), ...series.map((bars) => short(bars.values[at]))]),
    draw: (x, y) => series.map((bars, order) => layers.map((at) => {
      const [left, right] = [x(at), x(at + 1)];
      return s("rect", { class: `bar series-${order}`, x: left + (right - left) * 0.12, width: (right - left) * 0.76,
        y: y(bars.values[at]), height: y(0) - y(bars.values[at]) }, s("title", {}, `layer ${at}, ${bars.name}: ${short(bars.values[at])}`));
    })),
  });
}

/** `points`: [{name, x, y, href}]; smaller is better on both axes, and the line joins what nothing beats in both. */
export function paretoChart({ title, xLabel, yLabel, points, yBetter = "smaller" }) {
  const sign = yBetter === "smaller" ? 1 : -1;
  const front = paretoFront(points, sign);
  return frame({
    title, xLabel, yLabel,
    xs: points.map((point) => point.x), ys: points.map((point) => point.y),
    heads: ["model", xLabel, yLabel, "on the front"],
    rows: points.map((point) => [point.name, short(point.x), short(point.y), front.includes(point) ? "yes" : "no"]),
    draw: (x, y) => [
      s("polyline", { class: "line front", points: front.map((point) => `${x(point.x)},${y(point.y)}`).join(" ") }),
      points.map((point, at) => s("a", { href: point.href, "aria-label": point.name },
        s("circle", { class: front.includes(point) ? "dot series-0" : "dot series-1", cx: x(point.x), cy: y(point.y), r: 5 }, s("title", {}, point.name)),
        s("text", { class: "mark", x: x(point.x) + 8, y: y(point.y) + 4 }, String(at + 1)))),
    ],
  });
}

/** Those of `points` that no other one beats in x and, by `sign`, in y; by x. */
export function paretoFront(points, sign = 1) {
  const front = [];
  for (const point of [...points].sort((a, b) => a.x - b.x || sign * (a.y - b.y))) {
    if (!front.length || sign * point.y < sign * front.at(-1).y) front.push(point);
  }
  return front;
}
