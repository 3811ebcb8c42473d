// One query: who was asked and why, what everybody said to which prompt, and what else could have been.

import { get, key, post, server } from "./api.js";
import { timeline } from "./charts.js";
import { block, copy, count, facts, fixed, folded, h, inline, millis, moment, percent, say, table } from "./dom.js";
import { step, wasAnswered, wasAsked, why } from "./steps.js";

export async function query([id], status, signal) {
  const trace = await get(`/v1/dmoa/traces/${encodeURIComponent(id)}`, signal);
  const told = trace.dmoa, calls = callsOf(trace);
  const parts = told.steps.flatMap((one) => [...one.agents, one.summarizer]);
  const sum = (name) => parts.reduce((total, part) => total + (part[name] ?? 0), 0);
  return h("article", {},
    h("h1", {}, "One query"),
    h("h2", { class: "hint" }, "Question"), block(trace.query.text, "Question"),
    trace.query.system && folded("The client's system message", () => block(trace.query.system, "System message")),
    trace.query.turns?.length > 0 && folded(`${trace.query.turns.length} earlier turns`, () => h("div", {},
      trace.query.turns.map((turn) => h("div", {}, h("p", { class: "role" }, turn.role), block(turn.content, turn.role))))),
    trace.query.exchange && folded("Calls of tools and their results since", () => block(trace.query.exchange, "Calls of tools and results")),
    trace.query.final && folded("What the client wants of the answer: tools, form", () =>
      block(JSON.stringify(trace.query.final, null, 2), "Tools and form")),
    h("h2", { class: "hint" }, "Answer"), answers(trace),
    facts({
      "why it stopped": why(told.stop_reason), policy: told.policy, gate: told.gate_version ?? "none", "decided by": told.routed_by,
      steps: count(told.steps.length), took: millis(trace.wall_ms), "prompt tokens": count(sum("prompt_tokens")),
      "completion tokens": count(sum("completion_tokens")), cost: told.price === null ? "no price is known" : fixed(told.price, 6),
      degraded: told.degraded ? "yes: an agent was lost on the way" : "", answered: moment(trace.created_unix_s), trace: trace.trace_id,
      ...Object.fromEntries(Object.entries(trace.metadata ?? {}).map(([name, value]) => [`metadata ${name}`, value])),
    }),
    copies(trace, status),
    h("h2", {}, "When"), times(trace, calls),
    h("h2", {}, "Steps"), told.steps.map((one) => step(one, {
      promptOf: (part) => calls.get(part)?.messages,
      probabilities: routed(trace, one.step), offers: status.can_ask && offers(trace, one, signal),
    })),
    status.can_ask && whatIf(trace, status));
}
query.title = "One query";

function routed(trace, number) {
  const route = trace.routes.find((one) => one.step === number);
  return route ? trace.agents.map((name, i) => [name, route.probability_A[i]]) : null;
}

/** Return the recorded call of each agent and summarizer of the steps: an agent that was asked several times has as many, in order. */
function callsOf(trace) {
  const waiting = (trace.calls ?? []).slice(), found = new Map(); // older traces have none
  const take = (step, name) => { const at = waiting.findIndex((call) => call.step === step && call.agent === name); return at < 0 ? undefined : waiting.splice(at, 1)[0]; };
  for (const one of trace.dmoa.steps) {
    for (const agent of one.agents.filter(wasAsked)) found.set(agent, take(one.step, agent.name));
    found.set(one.summarizer, take(one.step, "summarizer"));
  }
  return found;
}

function times(trace, sent) {
  let begin = 0;
  const calls = trace.dmoa.steps.flatMap((one) => {
    const start = begin;
    begin += one.wall_ms;
    const asked = one.agents.filter(wasAsked).map((agent) => ({
      name: `${one.step + 1} ${agent.name}`, start: sent.get(agent)?.started_ms ?? start, ms: agent.latency_ms,
      kind: wasAnswered(agent) ? "call" : "lost", label: `${agent.name}, ${agent.status}: ${millis(agent.latency_ms)}`,
    }));
    const fold = one.summarizer.completion_tokens ? [{
      name: `${one.step + 1} summarizer`, start: sent.get(one.summarizer)?.started_ms ?? start, ms: one.summarizer.latency_ms, kind: "fold",
      label: `summarizer: ${millis(one.summarizer.latency_ms)}`,
    }] : [];
    return [...asked, ...fold];
  });
  return h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "When" }, timeline(calls, trace.wall_ms));
}

/** Return the answer, or each of several, with its calls of the client's tools. */
function answers(trace) {
  const made = trace.choices ?? [];
  if (!made.length) return block(trace.answer, "Answer");
  return h("div", {}, made.map((one, i) => h("div", {},
    made.length > 1 && h("p", { class: "role" }, `Answer ${i + 1}`), one.text && block(one.text, `Answer ${i + 1}`),
    one.tool_calls.map((call) => h("div", {}, h("p", { class: "role" }, "calls ", inline(call.name)),
      block(call.arguments, `Arguments ${i + 1}`))))));
}

/** Return the request that asks a trace's question again. */
function again(trace) {
  const { text, system, turns, exchange, final, limits, epsilon } = trace.query;
  const { template, ...sampling } = trace.query.sampling ?? {};
  const given = (values) => Object.fromEntries(Object.entries(values).filter(([, value]) => value !== null && value !== undefined));
  const { max_steps, max_agents, budget_tokens, budget_price, deadline_s } = limits ?? {};
  const isSingle = trace.dmoa.policy.split(":")[0] === "single", policy = isSingle ? "single" : trace.dmoa.policy;
  const form = final && {
    ...(final.tools.length && {
      tools: final.tools.map((one) => ({ type: "function", function: one })), parallel_tool_calls: final.is_parallel,
      tool_choice: final.tool_choice.startsWith("=") ? { type: "function", function: { name: final.tool_choice.slice(1) } } : final.tool_choice,
    }),
    ...(final.schema && { response_format: final.schema_name
      ? { type: "json_schema", json_schema: given({ name: final.schema_name, description: final.schema_description || null, schema: final.schema, strict: final.is_strict }) } : { type: "json_object" } }),
    ...(final.n > 1 && { n: final.n }), ...(final.top_logprobs !== null && { logprobs: true, top_logprobs: final.top_logprobs }),
  };
  return {
    model: isSingle ? trace.dmoa.steps[0].agents[0].name : trace.dmoa.pool, messages: [
      ...(system ? [{ role: "system", content: system }] : []), ...(turns ?? []), { role: "user", content: text },
      ...(exchange ? [{ role: "tool", content: exchange }] : []),
    ], ...sampling, ...(template && { chat_template_kwargs: Object.fromEntries(template) }), ...form,
    dmoa: given({ policy, max_steps, max_agents, budget_tokens, budget_price, deadline_s, epsilon }),
  };
}

function copies(trace, status) {
  const quote = (text) => `'${text.replaceAll("'", "'\\''")}'`; // what a file says is never a command
  const quoted = quote(JSON.stringify(again(trace)));
  const auth = key() ? " -H \"Authorization: Bearer $DMOA_API_KEY\"" : "";
  const place = status.can_ask ? server() : "\"$DMOA_URL\""; // of files no server is known
  const curl = `curl ${place}/v1/chat/completions -H 'Content-Type: application/json'${auth} -d ${quoted}`;
  const name = encodeURIComponent(trace.trace_id), address = quote(`${server()}/v1/dmoa/traces/${name}`), file = quote(`./${name}.jsonl`);
  const replay = `curl -s${auth} ${address} > ${file} && dmoa run --replay ${file} --config pool.yaml`;
  const button = (name, text) => h("button", { type: "button", onclick: () => copy(text, name) }, `Copy ${name}`);
  return h("div", { class: "actions" }, button("JSON", JSON.stringify(trace, null, 2)), button("curl", curl), button("replay command", replay));
}

function offers(trace, one, signal) {
  const asked = new Set(one.agents.filter(wasAsked).map((agent) => agent.name));
  const ranked = (routed(trace, one.step) ?? []).slice().sort((a, b) => b[1] - a[1]).map(([name]) => name).filter((name) => !asked.has(name));
  const names = ranked.slice(0, Math.max(1, one.k));
  const go = (body, what) => async (event) => {
    event.target.disabled = true;
    say(`${what}: asking again`);
    try {
      const reply = await post(`/v1/dmoa/traces/${encodeURIComponent(trace.trace_id)}/branch`, { step: one.step, ...body }, signal);
      location.hash = `#/query/${encodeURIComponent(reply.dmoa.trace_id)}`;
    } catch (error) {
      if (signal.aborted) return;
      say(error.message);
      event.target.disabled = false;
    }
  };
  return h("div", { class: "actions" },
    h("button", { type: "button", class: "branch", onclick: go({}, "Branch") }, "Ask again from here"),
    names.length > 0 && h("button", { type: "button", onclick: go({ agents: names }, "Next-ranked agents") }, `Ask ${names.join(", ")} instead`));
}

function whatIf(trace, status) {
  const kind = h("select", { id: "what-kind", "aria-label": "What to decide with" },
    h("option", { value: "gate_version" }, "another gate version"), h("option", { value: "policy" }, "another policy"));
  const name = h("input", { id: "what-name", list: "what-names", size: 32, "aria-label": "Name of the gate version or policy", value: status.router?.gate_version ?? "" });
  const names = h("datalist", { id: "what-names" });
  const place = h("div", { "aria-live": "polite" });
  const suggest = async () => {
    const before = name.value;
    const found = kind.value === "policy" ? status.policies
      : await get("/v1/dmoa/gates").then((gates) => [...new Set(gates.history.map((one) => one.version))].reverse(), () => []);
    names.replaceChildren(...found.map((one) => h("option", { value: one })));
    if (name.value === before) name.value = found[0] ?? ""; // else somebody has typed meanwhile
  };
  kind.addEventListener("change", suggest);
  suggest();
  const run = async (event) => {
    event.preventDefault();
    try {
      const found = await post(`/v1/dmoa/traces/${encodeURIComponent(trace.trace_id)}/what-if`, { [kind.value]: name.value });
      place.replaceChildren(table(`Whom ${name.value} would have asked, on the recorded inputs`, ["step", "asked", "would ask", "probabilities"],
        found.steps.map((one) => [String(one.step + 1), one.asked.join(", "), one.would_ask.join(", "),
          one.probabilities.slice(0, 5).map((part) => `${part.agent} ${percent(part.probability)}`).join(", ")])));
    } catch (error) { place.replaceChildren(h("p", { class: "problem", role: "alert" }, inline(error.message))); }
  };
  return h("section", { "aria-label": "What if" }, h("h2", {}, "What if"),
    h("p", { class: "hint" }, "Decides every recorded step again; no agent is asked."),
    h("form", { class: "filters", onsubmit: run }, h("label", {}, "decided by ", kind), name, names, h("button", { id: "what-run" }, "Decide again")), place);
}
