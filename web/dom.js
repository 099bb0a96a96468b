// Small helpers to build page elements. Text goes in as text nodes only: what a user or a file name says never becomes HTML.

const SVG = "http://www.w3.org/2000/svg";

/** @type {Readonly<Record<"card" | "card_warning" | "triangle" | "octagon", string[]>>} */
const ICON_PATHS = Object.freeze({
  card: ["M3.5 4h9A1.5 1.5 0 0 1 14 5.5v5a1.5 1.5 0 0 1-1.5 1.5h-9A1.5 1.5 0 0 1 2 10.5v-5A1.5 1.5 0 0 1 3.5 4z", "M5 12v2M8 12v2M11 12v2"],
  card_warning: [
    "M3.5 3h9A1.5 1.5 0 0 1 14 4.5v6a1.5 1.5 0 0 1-1.5 1.5h-9A1.5 1.5 0 0 1 2 10.5v-6A1.5 1.5 0 0 1 3.5 3z",
    "M5 12v2M8 12v2M11 12v2",
    "M8 5v2.6M8 9.2v.8",
  ],
  octagon: ["M5.2 1.5h5.6l3.7 3.7v5.6l-3.7 3.7H5.2l-3.7-3.7V5.2z", "M8 4.8v3.8M8 10.6v.9"],
  triangle: ["M8 1.5 15 14H1z", "M8 6v4M8 11.4v1"],
});

/** @typedef {keyof typeof ICON_PATHS} IconName */

/**
 * @template {keyof HTMLElementTagNameMap} Tag
 * @param {Tag} tag
 * @param {Record<string, string>} attributes
 * @param {...(Node | string)} children
 * @returns {HTMLElementTagNameMap[Tag]}
 */
export function h(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** @param {string} tag @param {Record<string, string>} attributes @param {...Node} children */
export function svg(tag, attributes, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** A decoration; what it means is always said in words as well. @param {IconName} name @param {string} className */
export function icon(name, className) {
  const paths = ICON_PATHS[name].map((d) => svg("path", { d }));
  return svg("svg", { class: className, viewBox: "0 0 16 16", "aria-hidden": "true" }, ...paths);
}

/** Links a style sheet that lies beside this file, once. @param {string} name */
export function addStylesheet(name) {
  const href = new URL(name, import.meta.url).href;
  const present = [...document.querySelectorAll("link[rel=stylesheet]")].some((link) => /** @type {HTMLLinkElement} */ (link).href === href);
  if (!present) document.head.append(h("link", { rel: "stylesheet", href }));
}

/** Whether an element stands on a light background. The front end marks its themes in no lasting way, so the colour itself is asked. @param {Element} element */
export function isOnLight(element) {
  for (let at = /** @type {Element | null} */ (element); at; at = at.parentElement) {
    const [red = 0, green = 0, blue = 0, alpha = 1] = (getComputedStyle(at).backgroundColor.match(/[\d.]+/g) ?? []).map(Number);
    if (alpha > 0.5) return 0.2126 * red + 0.7152 * green + 0.0722 * blue > 127;
  }
  return false;
}

/** Sets an attribute only where it changes, so that an unchanged reading costs the page nothing. @param {Element} element @param {string} name @param {string | null} value */
export function setAttribute(element, name, value) {
  if (element.getAttribute(name) === value) return;
  if (value === null) element.removeAttribute(name);
  else element.setAttribute(name, value);
}

/** @param {HTMLElement} element @param {boolean} hidden */
export function setHidden(element, hidden) {
  if (element.hidden !== hidden) element.hidden = hidden;
}

/**
 * Writes into the text node that is there: replacing it would wake every observer of the page's structure.
 * @param {Element} element
 * @param {string} text
 */
export function setText(element, text) {
  const [node] = element.childNodes;
  if (element.childNodes.length !== 1 || !(node instanceof Text)) element.textContent = text;
  else if (node.data !== text) node.data = text;
}

/** Says in `data-theme` on what an element stands. @param {HTMLElement} element */
export function markTheme(element) {
  if (element.isConnected) setAttribute(element, "data-theme", isOnLight(element) ? "light" : "dark");
}

/**
 * Marks the theme now, and again whenever the front end changes its colours.
 * @param {HTMLElement} element
 * @returns {() => void} ends it
 */
export function followTheme(element) {
  const watch = new MutationObserver(() => markTheme(element));
  const watched = { attributes: true, attributeFilter: ["style", "class"] };
  for (const root of [document.documentElement, document.body]) watch.observe(root, watched);
  markTheme(element);
  return () => watch.disconnect();
}
