// Gates: which versions were current, the evidence of each install, and the way back.

import { get, post } from "./api.js";
import { facts, folded, h, inline, moment, say, table } from "./dom.js";

const PLAIN = new Set(["version", "action", "previous", "note", "unix_s"]);
const CHANGES = new Set(["configured", "install", "adapted", "rollback"]); // the other entries are of offers

export async function gates(_, status, signal) {
  const found = await get("/v1/dmoa/gates", signal);
  const place = h("div", {});
  const draw = (told) => place.replaceChildren(shown(told, status, redo));
  const redo = async () => draw(await get("/v1/dmoa/gates"));
  draw(found);
  return h("div", {}, h("h1", {}, "Gates"), place);
}
gates.title = "Gates";

function shown(found, status, redo) {
  const times = new Map();
  for (const one of found.history.filter((each) => CHANGES.has(each.action))) {
    times.set(one.version, { ...one, count: (times.get(one.version)?.count ?? 0) + 1 });
  }
  const versions = [...times.values()].reverse();
  return h("div", {},
    facts({ current: found.current ?? "none", "deployed with": status.router?.configured_version, score: status.router?.score }),
    h("p", { class: "hint" }, status.is_admin ? "Queries under way finish with the gate that they began with."
      : "An admin key (DMOA_ADMIN_KEYS) may roll back; this one may not."),
    table("Versions", ["version", "last made current", "how", "times current", ...(status.is_admin ? ["go back"] : [])],
      versions.map((one) => [
        h("span", {}, inline(one.version), one.version === found.current && h("strong", { class: "good" }, " current")),
        moment(one.unix_s), one.action, String(one.count), ...(status.is_admin ? [one.version === found.current ? "" : back(one.version, redo)] : []),
      ])),
    h("h2", {}, "History, newest first"),
    h("ol", { class: "history" }, found.history.slice().reverse().map((one) => h("li", {},
      h("p", {}, h("strong", {}, one.action), " ", inline(one.version), " ", h("span", { class: "hint" }, moment(one.unix_s))),
      one.note && h("p", {}, inline(one.note)), h("p", { class: "hint" }, one.previous ? `before it: ${one.previous}` : "the first"),
      evidence(one)))));
}

function evidence(one) {
  const rest = Object.entries(one).filter(([name, value]) => !PLAIN.has(name) && value !== null);
  return rest.length > 0 && folded("Evidence", () => facts(Object.fromEntries(rest.map(([name, value]) =>
    [name.replaceAll("_", " "), typeof value === "object" ? JSON.stringify(value) : String(value)]))));
}

function back(version, redo) {
  const go = async (event) => {
    const button = event.target;
    if (!button.dataset.sure) {
      button.dataset.sure = "yes";
      button.textContent = "Really roll back?";
      return;
    }
    button.disabled = true;
    try {
      const done = await post("/v1/dmoa/gates/rollback", { version, note: "from the page" });
      say(`gate ${done.version} is current`);
      await redo();
    } catch (error) { say(error.message); button.disabled = false; }
  };
  return h("button", { type: "button", class: "rollback", onclick: go, "aria-label": `Roll back to ${version}` }, "Roll back");
}
