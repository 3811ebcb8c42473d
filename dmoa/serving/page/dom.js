// Makes elements. Data only ever becomes text nodes and attributes of our own choosing: no markup is ever parsed.

const SVG = "http://www.w3.org/2000/svg";
const NAMED = 2000; // unseen characters of a text that are named
const SHOWN = 20000; // characters of a long text that are shown unasked
const CONTROLS = /([\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e\u2060-\u206f\u3164\ufeff\uffa0\ufff9-\ufffb\u{e0000}-\u{e0fff}])/u;

/** Return an element; `props` are attributes, `on...` listeners, `style` an object of CSS properties, and `value` or `checked`. */
export function h(tag, props = {}, ...children) {
  return fill(document.createElement(tag), props, children);
}

/** Return an SVG element. */
export function s(tag, props = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), props, children);
}

function fill(element, props, children) {
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style") for (const [key, one] of Object.entries(value)) element.style.setProperty(key, one);
    else if (name === "value" || name === "checked") element[name] = value;
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** Return somebody's words as nodes: characters that are invisible, or turn the direction of the text, are named. */
export function words(text) {
  const parts = String(text).split(CONTROLS);
  if (parts.length > 2 * NAMED) return [parts.filter((_, i) => i % 2 === 0).join("\ufffd")];
  return parts.map((part, i) => {
    if (i % 2 === 0) return part;
    const code = part.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
    return h("span", { class: "control", title: "a character that is not seen" }, `U+${code}`);
  });
}

/** Return somebody's words within a line, kept from turning what stands around them. */
export function inline(text) {
  return h("bdi", {}, words(text));
}

/** Return somebody's words as a block; of a long one the beginning, and a button for the rest. */
export function block(text, label) {
  const whole = String(text);
  const pre = h("pre", { tabindex: 0, "aria-label": label }, words(whole.slice(0, SHOWN)));
  if (whole.length <= SHOWN) return pre;
  const more = h("button", { type: "button", onclick: () => { pre.replaceChildren(...words(whole)); more.remove(); } },
    `Show all ${count(whole.length)} characters`);
  return h("div", {}, pre, more);
}

/** Return a part that is folded until it is opened, and made only then. */
export function folded(title, make, isOpen = false) {
  const part = h("details", { open: isOpen }, h("summary", {}, title));
  const fillIn = () => { if (part.open && part.childElementCount === 1) part.append(make()); };
  part.addEventListener("toggle", fillIn);
  fillIn();
  return part;
}

/** Return a list of terms and what they are; empty ones are left out. */
export function facts(pairs) {
  const shown = Object.entries(pairs).filter(([, value]) => value !== null && value !== undefined && value !== "");
  return h("dl", { class: "facts" },
    shown.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value instanceof Node ? value : inline(value)))));
}

/** Return a table; cells are texts or nodes. */
export function table(caption, columns, rows) {
  return h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": caption },
    h("table", {}, h("caption", {}, caption), h("thead", {}, h("tr", {}, columns.map((name) => h("th", { scope: "col" }, name)))),
      h("tbody", {}, rows.map((row) => h("tr", {}, row.map((cell) => h("td", {}, cell instanceof Node ? cell : inline(cell ?? ""))))))));
}

/** Say something to whoever looks, and to screen readers. */
export function say(text) {
  const place = document.getElementById("said");
  place.textContent = text;
  clearTimeout(say.timer);
  say.timer = setTimeout(() => { place.textContent = ""; }, 4000);
}

/** Copy a text. */
export async function copy(text, what) {
  try {
    await navigator.clipboard.writeText(text);
    say(`${what} copied`);
  } catch {
    const area = h("textarea", { class: "copied", "aria-label": what, readonly: true, value: text });
    const close = h("button", { type: "button", onclick: () => box.remove() }, "Close");
    const box = h("div", { class: "box" }, h("p", {}, "The browser does not let this page copy; take it from here:"), area, close);
    document.getElementById("main").prepend(box);
    area.select();
  }
}

export const count = (number) => (number ?? 0).toLocaleString("en", { maximumFractionDigits: 0 });
export const fixed = (number, digits = 2) => (number === null || number === undefined ? "" : number.toFixed(digits));
export const percent = (share) => (share === null || share === undefined ? "" : `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)} %`);
export const millis = (ms) => (ms >= 10000 ? `${(ms / 1000).toFixed(1)} s` : `${Math.round(ms)} ms`);
export const moment = (unix) => new Date(unix * 1000).toLocaleString("sv");
