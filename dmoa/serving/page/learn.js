// Learning and evaluation: curves of trainings, accuracy against tokens and robustness curves, from the files of the runs.

import { get } from "./api.js";
import { chart } from "./charts.js";
import { count, facts, folded, h, inline, moment, percent, table } from "./dom.js";

export async function learn([id], status, signal) {
  const found = await get("/v1/dmoa/runs", signal);
  if (id !== undefined) return one(await get(`/v1/dmoa/runs/${encodeURIComponent(id)}`, signal));
  if (!found.data.length) {
    return h("div", {}, h("h1", {}, "Learning and evaluation"), h("p", {},
      "No runs are here. ", h("code", {}, "dmoa view DIR"), " shows the trainings, evaluations and traces of a folder."));
  }
  return h("div", {}, h("h1", {}, "Learning and evaluation"),
    table("Runs", ["run", "kind", "last written"], found.data.map((run) => [
      h("a", { href: `#/learn/${encodeURIComponent(run.id)}` }, inline(run.name)), run.kind, run.unix_s ? moment(run.unix_s) : ""])));
}
learn.title = "Learning and evaluation";

function one(run) {
  const draw = { training: training, evaluation: evaluation }[run.kind] ?? training;
  return h("div", {}, h("p", {}, h("a", { href: "#/learn" }, "All runs")), h("h1", {}, inline(run.name)), draw(run));
}

function training(run) {
  const lines = run.curves.flatMap((group) => group.series);
  const once = lines.filter((line) => line.points.length === 1);
  const curves = run.curves.map((group) => ({ ...group, series: group.series.filter((line) => line.points.length > 1) }));
  return h("div", {}, facts(run.facts),
    lines.length === 0 && h("p", { class: "hint" }, "Nothing was logged yet."),
    h("div", { class: "charts" }, curves.filter((group) => group.series.length).map((group) => chart({ title: group.series.length > 1 ? group.title : group.series[0].name, x: "step", y: group.title, series: group.series.map((line) =>
      ({ name: line.name, isLine: true, points: line.points.map(([x, y]) => ({ x, y })) })) }))),
    once.length > 0 && folded(`Logged once: ${count(once.length)}`, () => table("Logged once", ["figure", "value"],
      once.map((line) => [line.name, String(+line.points[0][1].toPrecision(5))])), true),
    run.settings && folded("Settings", () => h("pre", { tabindex: 0 }, JSON.stringify(run.settings, null, 2))));
}

function evaluation(run) {
  const benchmarks = [...new Set(run.rows.map((row) => row.benchmark))];
  return h("div", {}, facts(run.facts),
    h("h2", {}, "Accuracy against tokens"),
    h("div", { class: "charts" }, benchmarks.map((name) => chart({
      title: name, x: "tokens a row", y: "accuracy, %", yRange: [-4, 104],
      series: run.rows.filter((row) => row.benchmark === name && row.n).map((row) => ({
        name: row.policy, points: [{ x: row.tokens, y: 100 * row.accuracy, low: 100 * row.low, high: 100 * row.high }] })),
    }))),
    run.robustness.length > 0 && h("h2", {}, "Robustness"),
    h("div", { class: "charts" }, run.robustness.map((curve) => chart({ title: curve.title, x: curve.x, y: "accuracy, %", yRange: [-4, 104],
      series: curve.series.map((line) => ({ name: line.name, isLine: true, points: line.points.map(([x, y]) => ({ x, y: 100 * y })) })) }))),
    table("Accuracy", ["benchmark", "policy", "rows", "accuracy", "interval", "tokens a row", "steps", "agents a step"], run.rows.map((row) => [
      row.benchmark, row.policy, count(row.n), percent(row.accuracy), `${percent(row.low)} to ${percent(row.high)}`, count(row.tokens),
      row.steps_mean === null ? "" : row.steps_mean.toFixed(2), row.active_mean === null ? "" : row.active_mean.toFixed(2)])));
}
