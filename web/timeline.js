// The phases of a run as small bars: what each needs against what it can have, the one that fails marked.

import { h, icon } from "./dom.js";
import { t } from "./strings.js";
import { size } from "./text.js";

/** @import { Answer, Phase } from "./answers.js" */

/** How wide a phase is drawn, as a stand-in for how long it takes: nobody knows seconds before a run. @type {Readonly<Record<string, number>>} */
const WIDTHS = Object.freeze({ sample: 3, vae_decode: 2 });

/** @typedef {{ phase: Phase, first: number, times: number, marked: boolean }} Stretch phases alike that follow each other, the first one's index */

/** @param {Phase} phase */
export const widthOf = (phase) => WIDTHS[phase.kind] ?? 1;

/** @param {Answer} answer @returns {number | null} the phase the sentence is about */
export function offender(answer) {
  const shortest = Math.max(0, ...answer.phases.map((p) => p.short));
  if (answer.peakPhase !== null && (shortest === 0 || (answer.phases[answer.peakPhase]?.short ?? 0) > 0)) return answer.peakPhase;
  return shortest > 0 ? answer.phases.findIndex((p) => p.short === shortest) : null;
}

/** @param {Answer} answer @param {number | null} marked @returns {Stretch[]} */
export function stretches(answer, marked) {
  /** @type {Stretch[]} */
  const found = [];
  for (const [index, phase] of answer.phases.entries()) {
    const last = found.at(-1);
    const alike = last && look(last.phase) === look(phase);
    if (alike) last.times += 1;
    else found.push({ phase, first: index, times: 1, marked: false });
    if (index === marked) /** @type {Stretch} */ (found.at(-1)).marked = true;
  }
  return found;
}

/** @param {Answer} answer @param {number | null} marked index of the phase that fails @returns {HTMLElement[]} */
export function timeline(answer, marked) {
  const known = answer.phases.filter((p) => p.needed !== null);
  if (known.length === 0) return [];
  const top = Math.max(...known.map((p) => Math.max(p.weights + (p.needed?.expected ?? 0), p.weights + (p.available ?? 0))), 1);
  const bars = stretches(answer, marked).map((stretch) => bar(stretch, top));
  return [
    h(
      "figure",
      { class: "vrh-timeline" },
      h("div", { class: "vrh-phases", role: "list", "aria-label": t("phases_name") }, ...bars),
      h(
        "figcaption",
        { class: "vrh-keys" },
        key("weights", t("bars_weights")),
        key("work", t("bars_work")),
        key("short", t("bars_short")),
        key("limit", t("bars_limit")),
      ),
    ),
  ];
}

/** @param {Stretch} stretch @param {number} top bytes at the top of the drawing */
function bar({ phase, times, marked }, top) {
  const needed = phase.needed?.expected ?? 0;
  const over = phase.available === null ? 0 : Math.max(0, needed - phase.available);
  /** @param {number} bytes */
  const share = (bytes) => `${Math.round((1000 * bytes) / top) / 10}%`;
  const part = (/** @type {string} */ kind, /** @type {number} */ bytes) => h("i", { "data-part": kind, style: `height:${share(bytes)}` });
  const limit = phase.available === null ? [] : [h("i", { class: "vrh-limit", style: `bottom:${share(phase.weights + phase.available)}` })];
  const name = times > 1 ? t("phase_times", { title: phase.title, n: times }) : phase.title;
  return h(
    "div",
    { class: "vrh-phase", role: "listitem", style: `flex-grow:${widthOf(phase)}`, ...(marked ? { "data-offender": "true" } : {}) },
    h("div", { class: "vrh-column", "aria-hidden": "true" }, part("short", over), part("work", needed - over), part("weights", phase.weights), ...limit),
    h("span", { class: "vrh-phase-name" }, ...(marked ? [icon("triangle", "vrh-row-icon")] : []), name),
    h("span", { class: "vrh-spoken" }, `: ${told(phase)}`),
  );
}

/** @param {Phase} phase */
function told(phase) {
  if (phase.needed === null) return t("needs_unknown");
  const needs = t(phase.weights > 0 ? "needs_beside" : "needs", { size: size(phase.needed.expected), weights: size(phase.weights) });
  const can = phase.available === null ? "" : t("needs_free", { size: size(phase.available) });
  const short = phase.short > 0 ? t("phase_short", { size: size(phase.short) }) : "";
  return [needs, can, short].filter(Boolean).join(", ");
}

/** @param {string} kind @param {string} words */
function key(kind, words) {
  return h("span", {}, h("i", { "data-part": kind }), words);
}

/** @param {Phase} phase */
function look({ title, width, height, frames, batch, weights, needed, available }) {
  return JSON.stringify([title, width, height, frames, batch, weights, needed, available]);
}
