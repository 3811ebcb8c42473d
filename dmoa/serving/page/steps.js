// The steps of a query, as a trace or a reply tells of them.

import { bar } from "./charts.js";
import { block, count, facts, fixed, folded, h, inline, millis, percent } from "./dom.js";

const WHY = {
  summarizer: "the summarizer said that the answer is final", agreement: "the agents agreed", sure: "a reply was sure enough",
  max_steps: "it had all its steps", budget_tokens: "its budget of tokens was used up", budget_price: "its budget of money was used up",
  budget_calls: "its budget of calls was used up", deadline: "its deadline passed", single: "the policy asks once",
  no_agent: "agents were lost on the way; this is the best answer before", stages: "all set steps are done",
  schedule: "the policy's last step is done",
};

export const wasAsked = (agent) => agent.status !== "idle" && agent.status !== "masked";
export const wasAnswered = (agent) => agent.status === "ok" || agent.status === "examiner";
export const why = (reason) => (WHY[reason] ? `${reason}: ${WHY[reason]}` : reason ?? "");

/** Return one step; `more`: the prompt of an agent or the summarizer, every agent's probability, and what to offer under it. */
export function step(one, { promptOf = () => undefined, probabilities = null, offers = null } = {}) {
  const asked = one.agents.filter(wasAsked);
  const others = probabilities ?? one.agents.map((agent) => [agent.name, agent.probability]);
  const active = new Set(asked.slice(0, one.k).filter((agent) => !agent.explored).map((agent) => agent.name));
  const status = new Map(one.agents.map((agent) => [agent.name, agent.explored ? "explored" : agent.status]));
  return h("section", { class: "step", "aria-label": `Step ${one.step + 1}` },
    h("h3", {}, `Step ${one.step + 1}`),
    facts({
      "agents that counted": count(one.k), "their probability": percent(one.mass), took: millis(one.wall_ms),
      "leading answer is right": percent(one.right_probability), verdict: one.summarizer.verdict,
      "summarizer's tokens": one.summarizer.completion_tokens ? count(one.summarizer.prompt_tokens + one.summarizer.completion_tokens) : "",
    }),
    h("ol", { class: "probabilities", "aria-label": "Probability of each agent" },
      others.slice().sort((a, b) => b[1] - a[1]).map(([name, share]) => h("li", { class: active.has(name) ? "active" : "" },
        h("span", { class: "name" }, active.has(name) ? h("strong", {}, name) : name),
        bar(share, `${name}: ${percent(share)}${active.has(name) ? ", active" : ""}`, active.has(name) ? "on" : ""),
        h("span", {}, percent(share)), h("span", { class: "hint" }, active.has(name) ? "active" : status.get(name) ?? "idle")))),
    asked.map((agent) => reply(agent, promptOf(agent), active.has(agent.name))),
    one.summary !== undefined && one.summary !== null && folded(h("span", {}, "What the step came to ", h("span", { class: "hint" }, `(${one.summarizer.mode})`)), () =>
      h("div", {}, block(one.summary, `Summary of step ${one.step + 1}`),
        one.summarizer.reasoning && folded("What the summarizer thought", () => block(one.summarizer.reasoning, "Thought of the summarizer")),
        promptOf(one.summarizer) && prompt(promptOf(one.summarizer), "summarizer"))),
    one.summarizer.error && h("p", { class: "problem" }, inline(one.summarizer.error)), offers);
}

function reply(agent, messages, isActive) {
  const title = h("span", {}, h("strong", {}, agent.name), " ",
    h("span", { class: wasAnswered(agent) ? "hint" : "bad" }, agent.explored ? "explored" : agent.status === "ok" ? (isActive ? "" : "not counted") : agent.status),
    h("span", { class: "figures" },
      agent.entropy_nats !== null && ` ${fixed(agent.entropy_nats, 3)} nats`,
      agent.right_probability !== undefined && agent.right_probability !== null && `, right ${percent(agent.right_probability)}`,
      `, ${count(agent.prompt_tokens)} + ${count(agent.completion_tokens)} tokens, ${millis(agent.latency_ms)}`));
  return folded(title, () => h("div", {},
    agent.text === undefined ? h("p", { class: "hint" }, "The text is in the trace.") : block(agent.text ?? "", `Reply of ${agent.name}`),
    agent.error && h("p", { class: "problem" }, inline(agent.error)),
    agent.reasoning && folded("What it thought before", () => block(agent.reasoning, `Thought of ${agent.name}`)),
    messages && prompt(messages, agent.name),
    facts({
      "ended by": agent.finish_reason, engine: agent.engine, replica: agent.replica, attempts: agent.attempts > 1 ? agent.attempts : "",
      "cached tokens": agent.cached_tokens ? count(agent.cached_tokens) : "", "entropy over": agent.entropy_tokens ? `${agent.entropy_tokens} tokens, ${agent.entropy_kind}` : "",
      price: agent.price ?? "", "from the call cache": agent.memoised ? "yes" : "",
    })));
}

function prompt(messages, name) {
  return folded("The prompt, exactly as it was seen", () => h("div", {},
    messages.map((message) => h("div", {}, h("p", { class: "role" }, message.role), block(message.content, `${message.role} message to ${name}`)))));
}
