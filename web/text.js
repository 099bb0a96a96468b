// Numbers and words: every figure and sentence the browser side shows is made here.

import { t } from "./strings.js";

/**
 * @import { Fix, Phase } from "./answers.js"
 * @import { Key } from "./strings.js"
 * @import { Component, Device } from "./status.js"
 * @import { Level } from "./levels.js"
 */

const GIB = 2 ** 30;
const MIB = 2 ** 20;

/** @type {Readonly<Record<Exclude<Level, "ok">, Key>>} */
const LEVEL_KEYS = Object.freeze({ high: "level_high", very_high: "level_very_high", critical: "level_critical" });

/** What a fix does to the result. @type {Readonly<Record<Fix["picture"], string>>} */
const PICTURE_WORDS = Object.freeze({
  "": "",
  nothing: "the same picture",
  slower: "the same picture, later",
  tiled: "decoded in overlapping tiles, whose seams may show faintly",
  fewer: "fewer videos at once, each the same",
  lower_precision: "nearly the same picture: the weights are less precise",
  shorter: "a shorter video",
  smaller: "a smaller picture",
});

/** @type {Readonly<Record<Component["role"], Key>>} */
const ROLE_KEYS = Object.freeze({
  generator: "role_generator",
  text_encoder: "role_text_encoder",
  vae: "role_vae",
  clip_vision: "role_clip_vision",
  other: "role_other",
});

/** What stands beside a percentage; nothing stands beside a low one. @param {Level} level */
export function levelWord(level) {
  return level === "ok" ? "" : t(LEVEL_KEYS[level]);
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
  return t(Object.hasOwn(ROLE_KEYS, role) ? ROLE_KEYS[/** @type {Component["role"]} */ (role)] : ROLE_KEYS.other);
}

/** Where a component is, in words. @param {Pick<Component, "placement" | "bytes" | "bytesOnCard">} component */
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

/** What a fix changes in the result and in time: "a shorter video; streams 2.6 GB per step". @param {Fix} fix */
export function costWords(fix) {
  return [PICTURE_WORDS[fix.picture], fix.cost].filter(Boolean).join("; ");
}

/** "GPU 1: NVIDIA L4". @param {Device} device */
export function deviceWords(device) {
  return `GPU ${device.index}: ${device.name}`;
}
