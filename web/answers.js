// What the server says, checked once at the door: past this file every field has the type written here.

/**
 * @typedef {object} Device
 * @property {number} index
 * @property {string} name
 * @property {number} total
 * @property {number} used
 * @property {number} free
 * @property {number | null} reserved
 * @property {number | null} active
 * @property {number | null} ours
 * @property {number | null} others
 * @property {number} reclaimableFree free plus what the host drops by itself when asked
 * @property {number} pressure percent
 * @property {boolean} stale
 * @property {number} age seconds
 *
 * @typedef {object} Component
 * @property {string} name
 * @property {"generator" | "text_encoder" | "vae" | "clip_vision" | "other"} role
 * @property {"gpu" | "cpu" | "partial"} placement
 * @property {number} bytes
 * @property {number} bytesOnCard
 *
 * @typedef {{ name: string, state: string, components: Component[] }} Pipeline
 * @typedef {{ name: string, bytes: number, bytesOnCard: number, registered: boolean }} LoadedModel
 * @typedef {{ devices: Device[], pipelines: Pipeline[], models: LoadedModel[] }} Status
 *
 * @typedef {{ expected: number, lower: number, upper: number }} Estimate
 *
 * @typedef {object} Phase
 * @property {string} title
 * @property {number | null} width
 * @property {number | null} height
 * @property {number | null} frames
 * @property {number | null} batch
 * @property {Estimate | null} needed
 * @property {number | null} available
 * @property {number} short bytes missing; 0 when the phase fits
 *
 * @typedef {{ role: string, file: string, bytes: number | null }} Model
 * @typedef {"fits" | "fits_with_offload" | "does_not_fit" | "unknown"} Verdict
 *
 * @typedef {object} Answer
 * @property {Verdict} verdict
 * @property {string} message
 * @property {Phase[]} phases
 * @property {number | null} peakPhase index into phases
 * @property {Model[]} models
 * @property {string[]} assumptions
 */

const VERDICTS = ["fits", "fits_with_offload", "does_not_fit", "unknown"];
const ROLES = ["generator", "text_encoder", "vae", "clip_vision", "other"];
const PLACEMENTS = ["gpu", "cpu", "partial"];

/** The server said something, but not what was agreed. */
export class Malformed extends Error {}

/** @param {Response} response @returns {Promise<unknown>} */
export async function jsonOf(response) {
  if (!response.ok) throw new Malformed(`the server answered ${response.status}`);
  try {
    return await response.json();
  } catch (error) {
    throw error instanceof SyntaxError ? new Malformed("the answer is no JSON") : error;
  }
}

/** @param {unknown} json @returns {Status} */
export function readStatus(json) {
  const body = object(json, "the answer");
  return {
    devices: list(body.devices, "devices").map(device).filter((d) => d !== null),
    pipelines: list(body.pipelines ?? [], "pipelines").map(pipeline),
    models: list(body.loaded_models ?? [], "loaded_models").map(loadedModel),
  };
}

/** Only the verdict and its sentence are indispensable; what else is missing is simply not shown. @param {unknown} json @returns {Answer} */
export function readAnswer(json) {
  const body = object(json, "the answer");
  const { verdict, message } = body;
  if (typeof verdict !== "string" || !VERDICTS.includes(verdict)) throw new Malformed("verdict is none of the four");
  if (typeof message !== "string" || message === "") throw new Malformed("message is missing");
  const phases = Array.isArray(body.phases) ? body.phases.filter(isObject).map(phase) : [];
  const peak = numberOrNull(body.peak_phase);
  return {
    verdict: /** @type {Verdict} */ (verdict),
    message,
    phases,
    peakPhase: peak !== null && phases[peak] !== undefined ? peak : null,
    models: Array.isArray(body.models) ? body.models.filter(isObject).map(model) : [],
    assumptions: Array.isArray(body.assumptions) ? body.assumptions.filter((a) => typeof a === "string") : [],
  };
}

/** @param {unknown} json @returns {Device | null} null for an entry that stands for the absence of a card */
function device(json) {
  const d = object(json, "a device");
  const total = number(d.total_bytes, "total_bytes");
  if (d.kind === "none" || total <= 0) return null;
  const free = number(d.free_bytes, "free_bytes");
  const reclaimableFree = numberOrNull(d.reclaimable_free_bytes) ?? free;
  return {
    index: numberOrNull(d.index) ?? 0,
    name: text(d.name, "GPU"),
    total,
    used: number(d.used_bytes, "used_bytes"),
    free,
    reserved: numberOrNull(d.reserved_bytes),
    active: numberOrNull(d.active_bytes),
    ours: numberOrNull(d.ours_bytes),
    others: numberOrNull(d.others_bytes),
    reclaimableFree,
    pressure: numberOrNull(d.pressure_percent) ?? (100 * (total - reclaimableFree)) / total,
    stale: d.stale === true,
    age: numberOrNull(d.age_seconds) ?? 0,
  };
}

/** @param {unknown} json @returns {Pipeline} */
function pipeline(json) {
  const p = object(json, "a pipeline");
  return {
    name: text(p.name, "pipeline"),
    state: text(p.state, ""),
    components: list(p.components ?? [], "components").map(component),
  };
}

/** @param {unknown} json @returns {Component} */
function component(json) {
  const c = object(json, "a component");
  const bytes = numberOrNull(c.bytes) ?? 0;
  return {
    name: text(c.name, "model"),
    role: /** @type {Component["role"]} */ (oneOf(c.role, ROLES, "other")),
    placement: /** @type {Component["placement"]} */ (oneOf(c.placement, PLACEMENTS, "cpu")),
    bytes,
    bytesOnCard: numberOrNull(c.bytes_on_card) ?? 0,
  };
}

/** @param {unknown} json @returns {LoadedModel} */
function loadedModel(json) {
  const m = object(json, "a loaded model");
  return {
    name: text(m.name, "model"),
    bytes: numberOrNull(m.bytes) ?? 0,
    bytesOnCard: numberOrNull(m.bytes_on_card) ?? 0,
    registered: m.registered === true,
  };
}

/** @param {Record<string, unknown>} p @returns {Phase} */
function phase(p) {
  return {
    title: text(p.title, text(p.kind, "Phase")),
    width: numberOrNull(p.width),
    height: numberOrNull(p.height),
    frames: numberOrNull(p.frames),
    batch: numberOrNull(p.batch),
    needed: estimate(p.peak_allocated_bytes),
    available: numberOrNull(p.available_bytes),
    short: Math.max(0, numberOrNull(p.short_bytes) ?? 0),
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
  return { role: text(m.role, "other"), file: text(m.file, "unnamed file"), bytes: numberOrNull(m.bytes) };
}

/** @param {unknown} value @returns {value is Record<string, unknown>} */
function isObject(value) {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

/** @param {unknown} value @param {string} what @returns {Record<string, unknown>} */
function object(value, what) {
  if (!isObject(value)) throw new Malformed(`${what} is no object`);
  return value;
}

/** @param {unknown} value @param {string} what @returns {unknown[]} */
function list(value, what) {
  if (!Array.isArray(value)) throw new Malformed(`${what} is no list`);
  return value;
}

/** @param {unknown} value @param {string} what @returns {number} */
function number(value, what) {
  const n = numberOrNull(value);
  if (n === null) throw new Malformed(`${what} is no number`);
  return n;
}

/** @param {unknown} value @returns {number | null} */
function numberOrNull(value) {
  return typeof value === "number" && Number.isFinite(value) ? value : null;
}

/** @param {unknown} value @param {string} otherwise @returns {string} */
function text(value, otherwise) {
  return typeof value === "string" && value !== "" ? value : otherwise;
}

/** @param {unknown} value @param {string[]} allowed @param {string} otherwise @returns {string} */
function oneOf(value, allowed, otherwise) {
  return typeof value === "string" && allowed.includes(value) ? value : otherwise;
}
