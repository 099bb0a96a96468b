// What the server says of its cards, checked once at the door: past this file every field has the type written here.

import { list, number, numberOrNull, object, oneOf, text } from "./fields.js";

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
 * @typedef {"gpu" | "cpu" | "partial"} Placement
 * @typedef {"active" | "idle" | "offloaded"} PipelineState
 *
 * @typedef {object} Component
 * @property {string} name
 * @property {"generator" | "text_encoder" | "vae" | "clip_vision" | "other"} role
 * @property {Placement} placement
 * @property {number} bytes
 * @property {number} bytesOnCard
 *
 * @typedef {{ name: string, state: PipelineState, components: Component[] }} Pipeline
 * @typedef {{ name: string, bytes: number, bytesOnCard: number, registered: boolean, inUse: boolean }} LoadedModel
 * @typedef {{ version: string, devices: Device[], pipelines: Pipeline[], models: LoadedModel[] }} Status
 */

const ROLES = ["generator", "text_encoder", "vae", "clip_vision", "other"];
const PLACEMENTS = ["gpu", "cpu", "partial"];
const STATES = ["active", "idle", "offloaded"];

/** @param {unknown} json @returns {Status} */
export function readStatus(json) {
  const body = object(json, "the answer");
  return {
    version: text(body.version, ""),
    devices: list(body.devices, "devices").map(device).filter((d) => d !== null),
    pipelines: list(body.pipelines ?? [], "pipelines").map(pipeline),
    models: list(body.loaded_models ?? [], "loaded_models").map(loadedModel),
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
    state: /** @type {PipelineState} */ (oneOf(p.state, STATES, "idle")),
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
    inUse: m.in_use === true,
  };
}
