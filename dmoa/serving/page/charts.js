// Small drawings in SVG, in the colours of the page.

import { fixed, h, s } from "./dom.js";

const SERIES = 8;

/** Return a bar of a share, 0..1. */
export function bar(share, label, kind = "") {
  return h("span", { class: `bar ${kind}`, role: "img", "aria-label": label },
    h("span", { style: { width: `${Math.max(0, Math.min(1, share)) * 100}%` } }));
}

/** Return a histogram of counts in equal bins from 0 to `top`. */
export function histogram(counts, top, label) {
  const most = Math.max(1, ...counts), width = 84, height = 24, step = width / counts.length;
  if (!counts.some(Boolean)) return h("span", { class: "hint" }, "none yet");
  const mean = counts.reduce((sum, n, i) => sum + n * (i + 0.5), 0) / counts.reduce((sum, n) => sum + n, 0) / counts.length * top;
  return s("svg", { class: "histogram", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${label}, mean about ${fixed(mean)}` },
    s("title", {}, `${label}: ${counts.join(", ")} from 0 to ${top}`),
    s("line", { x1: 0, x2: width, y1: height - 0.5, y2: height - 0.5, class: "axis" }),
    counts.map((n, i) => s("rect", {
      x: i * step + 0.5, width: step - 1, y: height - 1 - (height - 2) * n / most, height: (height - 2) * n / most, class: "series-0",
    })));
}

function ticks(low, high, parts = 4) {
  const rough = (high - low) / parts || 1, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough);
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step / 1e6; at += step) found.push(at);
  return found;
}

const short = (n) => (Math.abs(n) >= 1000 ? `${+(n / 1000).toPrecision(3)}k` : String(+n.toPrecision(3)));

/**
 * Return a chart of series {name, points: [{x, y, low?, high?, label?}], isLine}: lines, or points with their intervals.
 */
export function chart({ title, x, y, series, yRange }) {
  const W = 640, H = 300, left = 56, right = 14, top = 12, bottom = 42;
  const all = series.flatMap((one) => one.points).filter((point) => Number.isFinite(point.x) && Number.isFinite(point.y));
  if (!all.length) return h("p", { class: "hint" }, `${title}: nothing to draw yet`);
  const ends = (values) => { const low = values.reduce((a, b) => Math.min(a, b)), high = values.reduce((a, b) => Math.max(a, b)); const pad = (high - low || Math.abs(high) || 1) * 0.06; return [low - pad, high + pad]; };
  const [x0, x1] = ends(all.map((point) => point.x));
  const [y0, y1] = yRange ?? ends(all.flatMap((point) => [point.y, point.low ?? point.y, point.high ?? point.y]));
  const px = (value) => left + (value - x0) / (x1 - x0) * (W - left - right);
  const py = (value) => H - bottom - (value - y0) / (y1 - y0) * (H - top - bottom);
  const drawn = series.map((one, i) => {
    const points = one.points.filter((point) => Number.isFinite(point.x) && Number.isFinite(point.y));
    const kind = `series-${i % SERIES}`;
    return s("g", { class: i < SERIES ? kind : `${kind} hollow` },
      one.isLine && s("polyline", { class: "line", points: points.map((point) => `${px(point.x)},${py(point.y)}`).join(" ") }),
      points.map((point) => [
        point.low !== undefined && s("line", { class: "interval", x1: px(point.x), x2: px(point.x), y1: py(point.low), y2: py(point.high) }),
        (!one.isLine || points.length < 40) && s("circle", { cx: px(point.x), cy: py(point.y), r: one.isLine ? 2 : 5 },
          s("title", {}, `${one.name}${point.label ? ` (${point.label})` : ""}: ${short(point.x)}, ${short(point.y)}`)),
      ]));
  });
  const svg = s("svg", { class: "chart", viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `${title}: ${y} against ${x}` },
    ticks(y0, y1).map((at) => [s("line", { class: "grid", x1: left, x2: W - right, y1: py(at), y2: py(at) }),
      s("text", { x: left - 6, y: py(at) + 4, "text-anchor": "end" }, short(at))]),
    ticks(x0, x1).map((at) => s("text", { x: px(at), y: H - bottom + 16, "text-anchor": "middle" }, short(at))),
    s("line", { class: "axis", x1: left, x2: W - right, y1: H - bottom, y2: H - bottom }), drawn,
    s("text", { x: (left + W - right) / 2, y: H - 6, "text-anchor": "middle" }, x),
    s("text", { x: 12, y: (top + H - bottom) / 2, transform: `rotate(-90 12 ${(top + H - bottom) / 2})`, "text-anchor": "middle" }, y));
  const legend = series.length > 1 && h("ul", { class: "legend" },
    series.map((one, i) => h("li", {}, h("span", { class: `dot series-${i % SERIES}${i < SERIES ? "" : " hollow"}`, "aria-hidden": "true" }), one.name)));
  return h("figure", {}, h("figcaption", {}, title), svg, legend);
}

/** Return calls [{name, start, ms, kind, label}] as bars on one time axis. */
export function timeline(calls, total) {
  const row = 22, left = 190, W = 1180, end = Math.max(total, ...calls.map((call) => call.start + call.ms), 1);
  const px = (ms) => left + ms / end * (W - left - 10);
  const H = calls.length * row + 24;
  return s("svg", { class: "timeline", viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `When each of ${calls.length} calls ran, over ${Math.round(end)} ms` },
    ticks(0, end, 9).map((at) => [s("line", { class: "grid", x1: px(at), x2: px(at), y1: 0, y2: H - 20 }),
      s("text", { x: px(at), y: H - 6, "text-anchor": "middle" }, end >= 2000 ? `${short(at / 1000)} s` : `${short(at)} ms`)]),
    calls.map((call, i) => [
      s("text", { x: left - 8, y: i * row + 15, "text-anchor": "end" }, call.name.slice(0, 28)),
      s("rect", { x: px(call.start), y: i * row + 4, height: row - 8, rx: 2, width: Math.max(2, px(call.start + call.ms) - px(call.start)), class: call.kind },
        s("title", {}, call.label)),
    ]));
}
