// Live: the pool, its agents, and the recent queries, which scroll however many there are.

import { get } from "./api.js";
import { bar, histogram } from "./charts.js";
import { count, facts, fixed, folded, h, inline, millis, moment, percent, table } from "./dom.js";

const PERIOD_MS = 4000, ROW = 46, PAGE = 200, SPARE = 12;
const SHOWN = new Set(["gate_version", "decisions", "masked", "cold", "supervision", "score", "untrained", "installed_unix_s", "activations"]);

export async function live(_, status, signal) {
  const top = h("div", {}, head(status), agents(status)), fault = h("div", { role: "status" });
  const list = queries(status, signal);
  let seen = Date.now(), isAsking = false;
  const timer = setInterval(async () => {
    if (isAsking || document.hidden || top.contains(document.activeElement)) return;
    isAsking = true; // a slow server is asked once at a time
    try {
      const found = await get("/v1/dmoa/status", signal, false);
      top.replaceChildren(head(found), agents(found));
      await list.refresh();
      seen = Date.now();
      fault.replaceChildren();
    } catch (error) {
      if (!signal.aborted) fault.replaceChildren(h("p", { class: "problem" }, inline(error.message), ` What is shown is of ${moment(seen / 1000)}.`));
    } finally { isAsking = false; }
  }, PERIOD_MS);
  signal.addEventListener("abort", () => clearInterval(timer));
  await list.restart();
  return h("div", {}, h("h1", {}, "Live"), fault, top, list.element);
}
live.title = "Live";

function head(status) {
  const router = status.router;
  if (!status.can_ask) return h("p", { class: "hint" }, "Files on disk; no server is asked.");
  if (!router) return h("p", { class: "problem" }, "The router is away; queries are decided by the ingress until it is back.");
  const rest = Object.entries(router).filter(([name]) => !SHOWN.has(name) && !["agents", "app", "pool"].includes(name));
  const learning = router.adaptation ?? {};
  return h("section", { "aria-label": "Pool" },
    facts({
      gate: router.gate_version + (router.untrained ? " (untrained)" : ""),
      "current since": router.installed_unix_s ? moment(router.installed_unix_s) : "",
      score: router.score, supervision: router.supervision, decisions: count(router.decisions),
      masked: (router.masked ?? []).join(", ") || "none", cold: (router.cold ?? []).join(", ") || "none",
      adaptation: learning.mode && (learning.frozen ? `${learning.mode}, frozen ${learning.frozen}` : learning.mode),
      "on trial": learning.trial && `${learning.trial.candidate}, ${count(learning.trial.queries?.candidate)} queries`,
      "adaptation so far": Object.entries(learning.counts ?? {}).filter(([, n]) => n).map(([name, n]) => `${name.replaceAll("_", " ")} ${count(n)}`).join(", "),
    }),
    folded("Everything the router says of itself: adaptation, counters, versions", () => facts(Object.fromEntries(rest.map(([name, value]) =>
      [name.replaceAll("_", " "), value !== null && typeof value === "object" ? JSON.stringify(value) : String(value ?? "")])))));
}

function agents(status) {
  const rows = status.statistics.map((one) => [
    one.agent, state(status.agents[one.agent]), count(one.calls),
    h("span", { class: "with-bar" }, bar(one.share, `${percent(one.share)} of the activations`), percent(one.share)),
    one.failed ? h("span", { class: "bad" }, count(one.failed)) : "0", one.latency_ms === null ? "" : millis(one.latency_ms),
    fixed(one.tokens_per_s, 0), fixed(one.load), histogram(one.entropies, one.max_nats, `entropy of ${one.agent}, nats per token`),
    histogram(one.right, 1, `probability that ${one.agent} is right`),
  ]);
  return table("Agents, over the queries listed below",
    ["agent", "state", "calls", "share of activations", "failed", "median", "tokens/s", "in flight, last minute", "entropy, 0 to 3 nats", "posterior, 0 to 1"], rows);
}

function state(text) {
  if (text === undefined) return h("span", { class: "hint" }, "not known");
  return h("span", { class: text === "up" ? "good" : text === "cold" ? "hint" : "bad" }, inline(text));
}

function queries(status, signal) {
  const wanted = { error: false, slow_ms: "", policy: "", gate_version: "", mine: false };
  let rows = [], next = null, isLoading = false, round = 0;
  const inner = h("div", { role: "list", "aria-label": "Queries, newest first", class: "rows" });
  const outer = h("div", { class: "viewport", tabindex: 0, role: "region", "aria-label": "Queries" }, columns(), inner);
  const total = h("p", { class: "hint", "aria-live": "polite" });

  const path = (before, limit = PAGE) => {
    const given = Object.entries({ ...wanted, before, limit }).filter(([, value]) => value !== "" && value !== false && value !== null);
    return `/v1/dmoa/traces?${new URLSearchParams(given)}`;
  };
  const draw = () => {
    const first = Math.max(0, Math.floor(outer.scrollTop / ROW) - SPARE);
    const last = Math.min(rows.length, Math.ceil((outer.scrollTop + outer.clientHeight || 800) / ROW) + SPARE);
    inner.style.height = `${rows.length * ROW}px`;
    inner.replaceChildren(...rows.slice(first, last).map((one, i) => row(one, first + i, rows.length)));
    total.textContent = rows.length ? `${count(rows.length)}${next ? " or more" : ""} queries` : "No queries here yet.";
    if (next && last > rows.length - 2 * SPARE) more();
  };
  const more = async () => {
    if (isLoading || !next) return;
    isLoading = true;
    const mine = round;
    try {
      const found = await get(path(next), signal);
      if (mine !== round) return;
      rows = rows.concat(found.data);
      next = found.next;
    } catch (error) { return failed(error); } finally { isLoading = false; }
    draw();
  };
  const failed = (error) => {
    if (!signal.aborted) total.replaceChildren(h("span", { class: "bad" }, inline(error.message)));
  };
  const restart = async () => {
    const mine = ++round;
    const found = await get(path(null), signal);
    if (mine !== round) return; // the filters have changed again
    rows = found.data;
    next = found.next;
    outer.scrollTop = 0;
    draw();
  };
  const refresh = async () => {
    if (outer.scrollTop > ROW || inner.contains(document.activeElement)) return; // somebody reads further down
    const mine = round, found = await get(path(null), signal, false);
    if (mine !== round) return;
    const end = found.next ? rows.findIndex((one) => one.trace_id === found.data.at(-1).trace_id) : -1;
    if (end < 0) { rows = found.data; next = found.next; round += 1; } else rows = found.data.concat(rows.slice(end + 1)); // one that came late stands below others
    draw();
  };
  outer.addEventListener("scroll", () => requestAnimationFrame(draw));

  const change = (name, read) => async (event) => { wanted[name] = read(event.target); await restart().catch(failed); };
  const versions = h("datalist", { id: "versions" });
  const suggest = async () => {
    const known = status.can_ask ? await get("/v1/dmoa/gates", signal, false).then((found) => found.history.map((one) => one.version), () => []) : [];
    const names = [status.router?.gate_version, ...known.reverse(), ...rows.map((one) => one.gate_version)].filter(Boolean);
    versions.replaceChildren(...[...new Set(names)].map((name) => h("option", { value: name })));
  };
  const filters = h("div", { class: "filters", role: "group", "aria-label": "Filters" },
    h("label", {}, h("input", { type: "checkbox", id: "only-errors", onchange: change("error", (box) => box.checked) }), " with errors"),
    h("label", {}, "slower than ", h("input", { type: "number", min: 0, step: 100, id: "slow", onchange: change("slow_ms", (box) => box.value) }), " ms"),
    h("label", {}, "policy ", select("policy", status.policies, change("policy", (box) => box.value))),
    h("label", {}, "gate ", h("input", { list: "versions", id: "gate", size: 14, onfocus: suggest, onchange: change("gate_version", (box) => box.value.trim()) })),
    versions,
    status.is_admin && h("label", {}, h("input", { type: "checkbox", onchange: change("mine", (box) => box.checked) }), " my own alone"));
  return { element: h("section", { "aria-label": "Recent queries" }, h("h2", {}, "Queries"), filters, total, outer), restart, refresh };
}

function select(id, names, onchange) {
  return h("select", { id, onchange }, h("option", { value: "" }, "any"), names.map((name) => h("option", { value: name }, name)));
}

function columns() {
  const names = ["answered", "question", "policy", "steps", "agents", "tokens", "took", ""];
  return h("div", { class: "row head", "aria-hidden": "true" }, names.map((name) => h("span", {}, name)));
}

function row(one, index, total) {
  const cells = [
    moment(one.created_unix_s).slice(5), inline(one.question.replace(/\s+/g, " ")), one.policy, count(one.steps), one.agents.join(", "),
    count(one.prompt_tokens + one.completion_tokens), millis(one.wall_ms),
    one.error ? h("span", { class: "bad", title: one.error }, one.steps ? "error" : inline(one.error)) : one.degraded ? h("span", { class: "warn" }, "degraded") : "",
  ];
  const made = cells.map((cell) => h("span", {}, cell));
  const link = one.steps ? h("a", { class: "row", href: `#/query/${encodeURIComponent(one.trace_id)}` }, made)
    : h("div", { class: "row lost", title: one.error }, made);
  return h("div", { role: "listitem", "aria-posinset": index + 1, "aria-setsize": total, style: { top: `${index * ROW}px` } }, link);
}
