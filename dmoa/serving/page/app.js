// The shell: which view the address names, the key, and what is shown when something fails.

import { askKey, get, key } from "./api.js";
import { h, inline } from "./dom.js";
import { gates } from "./gates.js";
import { learn } from "./learn.js";
import { live } from "./live.js";
import { play } from "./play.js";
import { query } from "./query.js";

const RETRY_MS = 4000;
const VIEWS = { live, query, play, gates, learn };
const main = document.getElementById("main");
let leaving = new AbortController();

async function show() {
  leaving.abort();
  leaving = new AbortController();
  const signal = leaving.signal;
  const [name, ...rest] = location.hash.replace(/^#\/?/, "").split("/").map(decoded);
  const view = VIEWS[name] ?? live;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.getAttribute("href") === `#/${view.name}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `dmoa: ${view.title}`;
  main.setAttribute("aria-busy", "true");
  try {
    const status = await get("/v1/dmoa/status", signal);
    document.getElementById("pool").textContent = status.pool;
    for (const link of document.querySelectorAll("[data-needs=ask]")) link.hidden = !status.can_ask;
    document.getElementById("key").textContent = key() ? (status.is_admin ? "Admin key" : "Key set") : "API key";
    const made = await view(rest, status, signal);
    if (signal.aborted) return;
    main.replaceChildren(made);
    if (show.hasMoved) main.focus({ preventScroll: true });
    show.hasMoved = true;
    window.scrollTo(0, 0);
  } catch (error) {
    if (signal.aborted) return;
    main.replaceChildren(h("h1", {}, view.title), h("p", { class: "problem", role: "alert" }, inline(error.message)),
      h("button", { type: "button", onclick: show }, "Try again"));
    if (error.isAway) {
      const again = setTimeout(show, RETRY_MS);
      signal.addEventListener("abort", () => clearTimeout(again));
    }
  } finally {
    if (!signal.aborted) main.removeAttribute("aria-busy");
  }
}

function decoded(part) {
  try { return decodeURIComponent(part); } catch { return part; }
}

document.getElementById("key").addEventListener("click", async () => {
  if (await askKey("Ordinary keys see their own queries; an admin key sees all, and may roll the gate back.")) show();
});
window.addEventListener("hashchange", show);
show();
