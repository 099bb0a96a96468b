// Numbers and words: how every figure the browser side shows is written, and the words that stand beside figures in several places.

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

/** What a fix does to the result. @type {Readonly<Record<Exclude<Fix["picture"], "">, Key>>} */
const PICTURE_KEYS = Object.freeze({
  nothing: "picture_nothing",
  slower: "picture_slower",
  tiled: "picture_tiled",
  fewer: "picture_fewer",
  lower_precision: "picture_lower_precision",
  shorter: "picture_shorter",
  smaller: "picture_smaller",
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
  return bytes === null ? t("not_known") : size(bytes);
}

/** @param {string} role */
export function roleWord(role) {
  return t(Object.hasOwn(ROLE_KEYS, role) ? ROLE_KEYS[/** @type {Component["role"]} */ (role)] : ROLE_KEYS.other);
}

/** Where a component is, in words. @param {Pick<Component, "placement" | "bytes" | "bytesOnCard">} component */
export function placementWords(component) {
  if (component.placement === "gpu") return t("on_the_card");
  if (component.placement === "cpu") return t("in_ram");
  const share = component.bytes > 0 ? wholePercent((100 * component.bytesOnCard) / component.bytes) : 0;
  return t("share_on_the_card", { percent: share });
}

/** What a phase works on: "1280×720, 81 frames", or "" where it is not known. @param {Phase} phase */
export function shapeWords(phase) {
  const parts = [];
  if (phase.width !== null && phase.height !== null) parts.push(`${phase.width}×${phase.height}`);
  if (phase.frames !== null) parts.push(t(phase.frames === 1 ? "shape_frame" : "shape_frames", { n: phase.frames }));
  if (phase.batch !== null && phase.batch > 1) parts.push(t("shape_batch", { n: phase.batch }));
  return parts.join(", ");
}

/** "9.4 GB", or "9.4 GB (8.9 to 10.6)" where the bounds say more. @param {Phase["needed"]} needed */
export function neededWords(needed) {
  if (needed === null) return t("not_known");
  const lower = gigabytes(needed.lower);
  const upper = gigabytes(needed.upper);
  const expected = size(needed.expected);
  return lower === upper ? expected : t("needed_between", { size: expected, lower, upper });
}

/** What a fix changes in the result and in time: "a shorter video; streams 2.6 GB per step". @param {Fix} fix */
export function costWords(fix) {
  return [fix.picture && t(PICTURE_KEYS[fix.picture]), fix.cost].filter(Boolean).join("; ");
}

/** "GPU 1: NVIDIA L4". @param {Device} device */
export function deviceWords(device) {
  return t("card_title_of_several", { index: device.index, name: device.name });
}
