// Small helpers. Data becomes text nodes and attributes only: nothing on this page is ever parsed as markup.

export const $ = (id) => document.getElementById(id);

/** An element: h("p", {class: "muted"}, "text", child). Attribute values that are null or false are left out. */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  set(element, attributes);
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

const SVG = "http://www.w3.org/2000/svg";

/** The same for SVG. */
export function s(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  set(element, attributes);
  element.append(...children);
  return element;
}

export function set(element, attributes) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) element.removeAttribute(name);
    else if (element.getAttribute(name) !== String(value)) element.setAttribute(name, value === true ? "" : String(value));
  }
}

/** Changes a text only when it differs: screen readers and selections are left alone. */
export function text(element, value) {
  const wanted = String(value);
  if (element.textContent !== wanted) element.textContent = wanted;
}

/** Keeps one child per item, by key: children that stay keep their focus. `make(item)` builds, `update(node, item)` fills. */
export function keyed(parent, items, keyOf, make, update) {
  const known = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  let place = parent.firstElementChild;
  for (const item of items) {
    const key = String(keyOf(item));
    let node = known.get(key);
    if (node === undefined) {
      node = make(item);
      node.dataset.key = key;
    }
    known.delete(key);
    update(node, item);
    if (node === place) place = place.nextElementSibling;
    else parent.insertBefore(node, place);
  }
  for (const node of known.values()) node.remove();
}

const counts = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const short = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });

export const count = (value) => (value === null || value === undefined ? "–" : counts.format(value));
export const compact = (value) => (value === null || value === undefined ? "–" : value < 10000 ? counts.format(value) : short.format(value));
export const share = (part, whole) => (whole > 0 ? `${Math.round((100 * part) / whole)} %` : "–");

/** 0.8 ms, 850 ms, 2.4 s, 3 min 5 s. */
export function duration(ms) {
  if (ms === null || ms === undefined) return "–";
  if (ms < 10) return `${ms.toFixed(1)} ms`;
  if (ms < 1000) return `${Math.round(ms)} ms`;
  if (ms < 60000) return `${(ms / 1000).toFixed(ms < 10000 ? 2 : 1)} s`;
  return `${Math.floor(ms / 60000)} min ${Math.round((ms % 60000) / 1000)} s`;
}

/** unix:/run/tokenrelay/worker-0.sock -> worker-0; host:port stays. */
export function worker(target) {
  if (!target.startsWith("unix:")) return target;
  return target.slice(target.lastIndexOf("/") + 1).replace(/\.sock$/, "") || target;
}
