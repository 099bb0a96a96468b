// What the server says of a prompt, checked once at the door: past this file every field has the type written here.

import { isObject, Malformed, numberOrNull, object, objects, strings, text } from "./fields.js";
import { t } from "./strings.js";

/**
 * @typedef {{ expected: number, lower: number, upper: number }} Estimate bytes
 *
 * @typedef {object} Phase
 * @property {string} title
 * @property {string} kind
 * @property {string[]} nodeIds
 * @property {number | null} width
 * @property {number | null} height
 * @property {number | null} frames
 * @property {number | null} batch
 * @property {number | null} steps of a sampler
 * @property {number} weights bytes of all models that are on the card then
 * @property {number} otherWeights of them, those of models that this phase does not use
 * @property {number} streamed bytes over the bus, per step where it samples
 * @property {Estimate | null} needed beside weights
 * @property {number | null} available for that
 * @property {number} short bytes missing; 0 when the phase fits
 * @property {Estimate | null} peak of everything ComfyUI holds then
 * @property {Estimate | null} reservedPeak of what a monitor will show, where that is known
 * @property {Term[]} terms of `needed`
 *
 * @typedef {{ name: string, bytes: number }} Term
 * @typedef {{ role: string, file: string, bytes: number | null, resident: number | null, nodeId: string }} Model
 * @typedef {{ node: string, input: string, value: unknown }} SetInput
 * @typedef {{ node: string, classType: string, inputs: Record<string, unknown> }} ReplaceNode
 * @typedef {SetInput | ReplaceNode} Change
 * @typedef {"nothing" | "slower" | "tiled" | "fewer" | "lower_precision" | "shorter" | "smaller"} Picture
 *
 * @typedef {object} Fix
 * @property {string} id
 * @property {string} title
 * @property {Change[]} changes empty: nothing in the graph changes, a person has to do what the title says
 * @property {number} saves bytes
 * @property {string} cost in time, may be ""
 * @property {Picture | ""} picture what it does to the result
 * @property {string} note may be ""
 *
 * @typedef {"fits" | "tight" | "does_not_fit" | "unknown"} RamVerdict
 * @typedef {{ verdict: RamVerdict, message: string, short: number }} Ram of the machine's own memory
 * @typedef {"fits" | "fits_with_offload" | "does_not_fit" | "unknown"} Verdict
 *
 * @typedef {object} Answer
 * @property {Verdict} verdict
 * @property {string} message
 * @property {string} card its name
 * @property {number | null} total bytes of the card
 * @property {number} others bytes of it that other programs hold
 * @property {Phase[]} phases
 * @property {number | null} peakPhase index into phases
 * @property {Model[]} models
 * @property {Fix[]} fixes best first
 * @property {Ram | null} ram
 * @property {string[]} assumptions
 * @property {unknown} raw as it came, for a report
 */

const VERDICTS = ["fits", "fits_with_offload", "does_not_fit", "unknown"];
const RAM_VERDICTS = ["fits", "tight", "does_not_fit", "unknown"];
const PICTURES = ["nothing", "slower", "tiled", "fewer", "lower_precision", "shorter", "smaller"];

/** Only the verdict and its sentence are indispensable; what else is missing is simply not shown. @param {unknown} json @returns {Answer} */
export function readAnswer(json) {
  const body = object(json, "the answer");
  const { verdict, message } = body;
  if (typeof verdict !== "string" || !VERDICTS.includes(verdict)) throw new Malformed("verdict is none of the four");
  if (typeof message !== "string" || message === "") throw new Malformed("message is missing");
  const phases = objects(body.phases).map(phase);
  const peak = numberOrNull(body.peak_phase);
  return {
    verdict: /** @type {Verdict} */ (verdict),
    message,
    card: text(isObject(body.card) ? body.card.name : null, t("unnamed_card")),
    total: isObject(body.card) ? numberOrNull(body.card.total_bytes) : null,
    others: Math.max(0, ...objects(body.phases).map((p) => numberOrNull(p.other_programs_bytes) ?? 0)),
    phases,
    peakPhase: peak !== null && phases[peak] !== undefined ? peak : null,
    models: objects(body.models).map(model),
    fixes: objects(body.fixes).map(fix).filter((f) => f !== null),
    ram: isObject(body.ram) ? ram(body.ram) : null,
    assumptions: strings(body.assumptions),
    raw: json,
  };
}

/** @param {Record<string, unknown>} p @returns {Phase} */
function phase(p) {
  const otherWeights = numberOrNull(p.other_models_bytes) ?? 0;
  return {
    title: text(p.title, text(p.kind, t("unnamed_phase"))),
    kind: text(p.kind, "other"),
    nodeIds: strings(p.node_ids),
    width: numberOrNull(p.width),
    height: numberOrNull(p.height),
    frames: numberOrNull(p.frames),
    batch: numberOrNull(p.batch),
    steps: numberOrNull(p.steps),
    weights: (numberOrNull(p.resident_bytes) ?? 0) + otherWeights,
    otherWeights,
    streamed: numberOrNull(p.streamed_bytes) ?? 0,
    needed: estimate(p.activation_bytes),
    available: numberOrNull(p.available_bytes),
    short: Math.max(0, numberOrNull(p.short_bytes) ?? 0),
    peak: estimate(p.peak_allocated_bytes),
    reservedPeak: estimate(p.peak_reserved_bytes),
    terms: objects(p.activation_terms).map((term) => ({ name: text(term.name, "?"), bytes: numberOrNull(term.bytes) ?? 0 })),
  };
}

/** @param {unknown} json @returns {Estimate | null} */
function estimate(json) {
  if (!isObject(json)) return null;
  const expected = numberOrNull(json.expected);
  if (expected === null) return null;
  return { expected, lower: numberOrNull(json.lower) ?? expected, upper: numberOrNull(json.upper) ?? expected };
}

/** @param {Record<string, unknown>} m @returns {Model} */
function model(m) {
  return {
    role: text(m.role, "other"),
    file: text(m.file, t("unnamed_file")),
    bytes: numberOrNull(m.bytes),
    resident: numberOrNull(m.resident_bytes),
    nodeId: text(m.node_id, ""),
  };
}

/** @param {Record<string, unknown>} f @returns {Fix | null} null for one with a change that can't be read: half a fix is none */
function fix(f) {
  const title = text(f.title, "");
  const changes = Array.isArray(f.changes) ? f.changes.map(change) : [];
  if (title === "" || changes.includes(null)) return null;
  const picture = typeof f.picture === "string" && PICTURES.includes(f.picture) ? f.picture : "";
  return {
    id: text(f.id, title),
    title,
    changes: /** @type {Change[]} */ (changes),
    saves: Math.max(0, numberOrNull(f.saves_bytes) ?? 0),
    cost: text(f.cost, ""),
    picture: /** @type {Fix["picture"]} */ (picture),
    note: text(f.note, ""),
  };
}

/** @param {unknown} json @returns {Change | null} */
function change(json) {
  if (!isObject(json) || typeof json.node_id !== "string") return null;
  if (typeof json.class_type === "string" && isObject(json.inputs)) {
    return { node: json.node_id, classType: json.class_type, inputs: json.inputs };
  }
  return typeof json.input === "string" ? { node: json.node_id, input: json.input, value: json.value } : null;
}

/** @param {Record<string, unknown>} r @returns {Ram | null} */
function ram(r) {
  if (typeof r.verdict !== "string" || !RAM_VERDICTS.includes(r.verdict) || typeof r.message !== "string") return null;
  const missing = (numberOrNull(r.needed_bytes) ?? 0) - (numberOrNull(r.available_bytes) ?? 0);
  return { verdict: /** @type {RamVerdict} */ (r.verdict), message: r.message, short: Math.max(0, missing) };
}
