// Asks the server. The API key is asked for when it is needed, and kept in this tab alone.

import { h } from "./dom.js";

const ROOT = document.documentElement.dataset.root;
const STORE = "dmoa-api-key";
const CUT = "The server ended the answer too early; ask again.";

export const server = () => location.origin + ROOT;
export const key = () => sessionStorage.getItem(STORE) ?? "";

function headers(more = {}) {
  return key() ? { ...more, Authorization: `Bearer ${key()}` } : more;
}

/** Ask for the key in a dialog; resolves to whether one was given. */
export function askKey(why) {
  return new Promise((resolve) => {
    const field = h("input", {
      type: "password", id: "key-field", autocomplete: "off", value: key(), pattern: "\\s*[!-~]*\\s*", title: "letters, digits and signs without blanks",
    });
    const done = (isGiven) => { box.close(); box.remove(); resolve(isGiven); };
    const keep = (event) => {
      event.preventDefault();
      if (field.value.trim()) sessionStorage.setItem(STORE, field.value.trim());
      else sessionStorage.removeItem(STORE);
      done(true);
    };
    const box = h("dialog", { "aria-labelledby": "key-title", oncancel: (event) => { event.preventDefault(); done(false); } },
      h("form", { onsubmit: keep }, h("h2", { id: "key-title" }, "API key"), h("p", {}, why),
        h("label", { for: "key-field" }, "Key, kept in this tab until it is closed"), field,
        h("div", { class: "actions" }, h("button", { class: "first" }, "Use it"),
          h("button", { type: "button", onclick: () => done(false) }, "Cancel"))));
    document.body.append(box);
    box.showModal();
  });
}

let asking = null;

async function request(path, options, isAsking = true) {
  for (;;) {
    const used = key();
    let response;
    try {
      response = await fetch(ROOT + path, { ...options, headers: headers(options.headers) });
    } catch (error) {
      throw error.name === "AbortError" ? error : Object.assign(new Error("The server does not answer; is it still running?"), { isAway: true });
    }
    if (response.status !== 401 || !isAsking) return response;
    if (used !== key()) continue; // another request has asked for it meanwhile
    asking ??= askKey(used ? "This key is not known here." : "This server wants an API key.").finally(() => { asking = null; });
    if (!(await asking)) return response;
  }
}

async function failure(response) {
  const text = await response.text();
  let message = `${response.status} ${response.statusText}`;
  try { message = JSON.parse(text).error.message; } catch { /* not ours: a proxy's page */ }
  const error = new Error(message);
  error.status = response.status;
  error.isAway = [502, 503, 504].includes(response.status); // and back in a moment: what holds its port answers so
  return error;
}

/** Return what a route answers as an object. Throws an Error with the server's own message; `isAsking`: asks for a key where one is wanted. */
export async function get(path, signal, isAsking = true) {
  const response = await request(path, { signal }, isAsking);
  if (!response.ok) throw await failure(response);
  return response.json();
}

export async function post(path, body, signal) {
  const options = { method: "POST", body: JSON.stringify(body), headers: { "Content-Type": "application/json" }, signal };
  const response = await request(path, options);
  if (!response.ok) throw await failure(response);
  return response.json();
}

/** Yield the chunks of a streamed reply. Throws as `get`, also for an error in mid-stream. */
export async function* stream(path, body, signal) {
  const options = { method: "POST", body: JSON.stringify({ ...body, stream: true }), headers: { "Content-Type": "application/json" } };
  const response = await request(path, { ...options, signal });
  if (!response.ok) throw await failure(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read().catch((error) => {
      throw error.name === "AbortError" ? error : new Error(CUT);
    });
    if (done) throw new Error(CUT);
    held += value;
    const events = held.split("\n\n");
    held = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      yield chunk;
    }
  }
}
