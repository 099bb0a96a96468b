// Numbers and words: every figure and sentence the browser side shows is made here.

/** @import { Component, Phase } from "./answers.js" */
/** @typedef {"ok" | "high" | "critical"} Level */

const GIB = 2 ** 30;
const MIB = 2 ** 20;

/** The bands of pressure, in percent: green below `high`, amber below `critical`, red from there. */
export const BANDS = Object.freeze({ high: 60, critical: 80 });

/** @type {Readonly<Record<Component["role"], string>>} */
const ROLE_WORDS = Object.freeze({
  generator: "generator",
  text_encoder: "text encoder",
  vae: "VAE",
  clip_vision: "CLIP vision",
  other: "model",
});

/** @param {number} pressure percent @returns {Level} */
export function levelOf(pressure) {
  if (pressure >= BANDS.critical) return "critical";
  return pressure >= BANDS.high ? "high" : "ok";
}

/**
 * Whole percent, rounded down: 59.9 shown as 60 would contradict its green.
 * @param {number} percent
 */
export function wholePercent(percent) {
  return Math.floor(Math.min(100, Math.max(0, percent)));
}

/** A size without its unit, in GB of 2**30: "5.6", "16". @param {number} bytes */
export function gigabytes(bytes) {
  return (Math.round((bytes / GIB) * 10) / 10).toString();
}

/** A size with its unit; below a tenth of a GB in MB. @param {number} bytes */
export function size(bytes) {
  if (bytes > 0 && bytes < 0.1 * GIB) return `${Math.max(1, Math.round(bytes / MIB))} MB`;
  return `${gigabytes(bytes)} GB`;
}

/** @param {number | null} bytes */
export function sizeOrUnknown(bytes) {
  return bytes === null ? "not known" : size(bytes);
}

/** @param {string} role */
export function roleWord(role) {
  return Object.hasOwn(ROLE_WORDS, role) ? ROLE_WORDS[/** @type {Component["role"]} */ (role)] : ROLE_WORDS.other;
}

/** Where a component is, in words. @param {Component} component */
export function placementWords(component) {
  if (component.placement === "gpu") return "on the card";
  if (component.placement === "cpu") return "in RAM";
  const share = component.bytes > 0 ? wholePercent((100 * component.bytesOnCard) / component.bytes) : 0;
  return `${share} % on the card`;
}

/** What a phase works on: "1280×720, 81 frames", or "" where it is not known. @param {Phase} phase */
export function shapeWords(phase) {
  const parts = [];
  if (phase.width !== null && phase.height !== null) parts.push(`${phase.width}×${phase.height}`);
  if (phase.frames !== null) parts.push(`${phase.frames} ${phase.frames === 1 ? "frame" : "frames"}`);
  if (phase.batch !== null && phase.batch > 1) parts.push(`batch of ${phase.batch}`);
  return parts.join(", ");
}

/** "9.4 GB", or "9.4 GB (8.9 to 10.6)" where the bounds say more. @param {Phase["needed"]} needed */
export function neededWords(needed) {
  if (needed === null) return "not known";
  const lower = gigabytes(needed.lower);
  const upper = gigabytes(needed.upper);
  const spread = lower === upper ? "" : ` (${lower} to ${upper})`;
  return `${size(needed.expected)}${spread}`;
}
