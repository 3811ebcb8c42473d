// Playground: asks a question and shows the steps as they come; with two policies side by side.

import { stream } from "./api.js";
import { count, facts, h, inline, millis, words } from "./dom.js";
import { step, why } from "./steps.js";

export async function play(_, status, signal) {
  const policies = status.policies.filter((name) => !name.includes(":"));
  const text = h("textarea", { id: "question", rows: 3, required: true });
  const first = choice("first", policies, policies[0]);
  const second = choice("second", ["", ...policies], "");
  const most = h("input", { type: "number", id: "max-steps", min: 1, max: 100, size: 4 });
  const places = h("div", { class: "columns" });
  const button = h("button", { class: "first", id: "ask" }, "Ask");
  let asking = new AbortController();
  signal.addEventListener("abort", () => asking.abort());
  const ask = async (event) => {
    event.preventDefault();
    asking.abort();
    asking = new AbortController();
    const mine = asking;
    const chosen = [first.value, second.value].filter(Boolean);
    const columns = chosen.map((policy) => column(policy));
    places.replaceChildren(...columns.map((one) => one.element));
    stop.hidden = false;
    await Promise.all(columns.map((one, i) => follow(one, status.pool, chosen[i], text.value, most.value, mine.signal)));
    if (mine === asking) stop.hidden = true;
  };
  const stop = h("button", { type: "button", hidden: true, onclick: () => asking.abort() }, "Stop");
  return h("div", {}, h("h1", {}, "Playground"),
    h("form", { class: "ask", onsubmit: ask }, h("label", { for: "question" }, "Question"), text,
      h("div", { class: "filters" }, h("label", {}, "policy ", first), h("label", {}, "beside it ", second),
        h("label", {}, "at most ", most, " steps"), button, stop)), places);
}
play.title = "Playground";

function choice(id, names, chosen) {
  return h("select", { id }, names.map((name) => h("option", { value: name, selected: name === chosen }, name || "nothing")));
}

function column(policy) {
  const lines = h("ol", { class: "stream" }), thought = h("p", { class: "thought hint" }), answer = h("pre", { class: "answer" }), end = h("div", {});
  const element = h("section", { class: "column", "aria-label": `Policy ${policy}`, "aria-live": "polite" }, h("h2", {}, policy), lines, thought, answer, end);
  return { element, lines, thought, answer, end };
}

async function follow(place, pool, policy, question, most, signal) {
  const body = {
    model: pool, messages: [{ role: "user", content: question }], stream_options: { include_usage: true },
    dmoa: { policy, ...(most ? { max_steps: Number(most) } : {}) },
  };
  const started = performance.now();
  let told = null, usage = null;
  try {
    for await (const chunk of stream("/v1/chat/completions", body, signal)) {
      usage = chunk.usage ?? usage;
      told = chunk.dmoa ?? told;
      const delta = chunk.choices[0]?.delta ?? {};
      if (delta.dmoa_step !== undefined) place.lines.append(h("li", {}, inline(delta.reasoning_content.trim())));
      else if (delta.reasoning_content) place.thought.append(...words(delta.reasoning_content));
      if (delta.content) place.answer.append(...words(delta.content));
    }
  } catch (error) {
    place.end.append(h("p", { class: "problem", role: "alert" }, inline(signal.aborted ? "stopped" : error.message)));
    return;
  }
  if (!told) return;
  place.end.append(
    facts({ "why it stopped": why(told.stop_reason), steps: count(told.steps.length), tokens: count(usage?.total_tokens), took: millis(performance.now() - started) }),
    h("p", {}, h("a", { href: `#/query/${encodeURIComponent(told.trace_id)}` }, "Open the query, with every prompt and text")),
    ...told.steps.map((one) => step(one)));
}
