// What the badge of each node says: loaders what they will take or where it is, samplers and the VAE's nodes their peak.

import { measuredWords, predictedOf } from "./chart.js";
import { placementOf } from "./inventory.js";
import { t } from "./strings.js";
import { gigabytes, size } from "./text.js";

/**
 * @import { Answer, Model, Phase } from "./answers.js"
 * @import { Run } from "./run.js"
 * @import { Status } from "./status.js"
 *
 * @typedef {{ text: string, bytes: number, bad: boolean }} BadgeText `bytes`: which of several says most; `bad`: it does not fit
 *
 * @typedef {object} Known
 * @property {Answer | null} plan of the graph on the canvas
 * @property {Run | null} run of that same graph
 * @property {Status | null} status
 */

/** Phases whose node says what they take: text encoding seldom decides, and its graphs have two of it. */
const KINDS = Object.freeze(["sample", "vae_decode", "vae_encode"]);

/** @param {Known} known @returns {Map<string, BadgeText>} by id of the node in the prompt */
export function badgeTexts({ plan, run, status }) {
  /** @type {Map<string, BadgeText>} */
  const found = new Map();
  // what has run already is not in the plan of the same graph any more: ComfyUI would take it from its cache
  for (const answer of [run?.plan, plan]) {
    for (const model of answer?.models ?? []) {
      const text = loaderText(model, status);
      if (text && model.nodeId) found.set(model.nodeId, text);
    }
  }
  /** @type {Map<string, Phase[]>} */
  const phases = new Map();
  for (const answer of [run?.plan, plan]) {
    const own = (answer?.phases ?? []).filter((phase) => KINDS.includes(phase.kind));
    for (const id of new Set(own.flatMap((phase) => phase.nodeIds))) phases.set(id, own.filter((phase) => phase.nodeIds.includes(id)));
  }
  for (const [id, own] of phases) found.set(id, phaseText(own, measuredAt(run, id)));
  return found;
}

/** @param {ReadonlyMap<string, BadgeText>} texts @param {string} id of a subgraph's node: it says what the worst of its nodes says */
export function worstWithin(texts, id) {
  const inner = [...texts].filter(([at, text]) => at.startsWith(`${id}:`) && text.bytes > 0).map(([, text]) => text);
  return inner.reduce((/** @type {BadgeText | null} */ worst, text) => (worst && rank(worst) >= rank(text) ? worst : text), null);
}

/** @param {BadgeText} text */
function rank({ bytes, bad }) {
  return bytes + (bad ? Number.MAX_SAFE_INTEGER : 0);
}

/** @param {Model} model @param {Status | null} status @returns {BadgeText | null} */
function loaderText(model, status) {
  const takes = model.resident ?? model.bytes;
  if (!takes || model.role === "lora") return null;
  const there = loadedOf(model, status);
  const text = there ? t("badge_here", { size: size(takes), placement: placementOf(there.bytes, there.bytesOnCard) }) : t("badge_takes", { size: size(takes) });
  return { text, bytes: 0, bad: false };
}

/** @param {Model} model @param {Status | null} status */
function loadedOf({ nodeId, file }, status) {
  const component = status?.pipelines.flatMap((p) => p.components).find((c) => c.nodeId === nodeId);
  return component ?? status?.models.find((m) => m.file !== "" && nameOf(m.file) === nameOf(file));
}

/** @param {string} path */
function nameOf(path) {
  return path.split(/[\\/]/).at(-1);
}

/** @param {Run | null} run @param {string} id */
function measuredAt(run, id) {
  const own = (run?.measured ?? []).filter((m) => m.nodeId === id && m.bytes > 0);
  return own.reduce((/** @type {Run["measured"][number] | null} */ most, m) => (most && most.bytes >= m.bytes ? most : m), null);
}

/** @param {Phase[]} phases of one node @param {Run["measured"][number] | null} measured @returns {BadgeText} */
function phaseText(phases, measured) {
  const predicted = phases.flatMap((phase) => predictedOf(phase)?.expected ?? []);
  const short = Math.max(0, ...phases.map((phase) => phase.short));
  if (predicted.length === 0) {
    return measured
      ? { text: t("badge_measured_alone", { measured: measuredWords(measured) }), bytes: measured.bytes, bad: false }
      : { text: t("badge_unknown"), bytes: 1, bad: false };
  }
  const peak = Math.max(...predicted);
  if (measured) {
    const told = { measured: measuredWords(measured), predicted: gigabytes(peak) };
    return { text: t("badge_measured", told), bytes: measured.bytes, bad: false };
  }
  const text = short > 0 ? t("badge_short", { size: size(peak), short: size(short) }) : t("badge_peak", { size: size(peak) });
  return { text, bytes: peak, bad: short > 0 };
}
