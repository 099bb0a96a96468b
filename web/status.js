// What the server says of its cards, checked once at the door: past this file every field has the type written here.

import { isObject, list, number, numberOrNull, object, objects, oneOf, text } from "./fields.js";
import { t } from "./strings.js";

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
 * @typedef {"generator" | "text_encoder" | "vae" | "clip_vision" | "other"} Role
 *
 * @typedef {object} Component
 * @property {string} name
 * @property {Role} role
 * @property {Placement} placement
 * @property {number} bytes
 * @property {number} bytesOnCard
 * @property {number | null} key names it in actions; null where it can't be moved
 * @property {string} dtype may be ""
 * @property {boolean} pinned
 * @property {boolean} elastic its weights come and go by themselves
 * @property {boolean} inUse
 * @property {string} policy in words, may be ""
 * @property {number | null} idleSeconds since its pipeline was used
 * @property {number | null} age of its figures, in seconds
 * @property {number | null} deviceIndex
 * @property {string | null} nodeId of its loader
 *
 * @typedef {{ name: string, state: PipelineState, components: Component[] }} Pipeline
 *
 * @typedef {object} LoadedModel
 * @property {string} name of its class
 * @property {string} file may be ""
 * @property {Role} role
 * @property {string} dtype may be ""
 * @property {number} bytes
 * @property {number} bytesOnCard
 * @property {boolean} registered
 * @property {boolean} inUse
 * @property {boolean} pinned
 * @property {boolean} elastic
 * @property {number | null} key
 * @property {number | null} deviceIndex
 * @property {number | null} age seconds
 *
 * @typedef {{ total: number, available: number, limit: number | null, ours: number | null }} Memory of the machine, bytes
 * @typedef {{ id: string, action: string, key: number | null, seconds: number }} Waiting an action that waits
 * @typedef {{ name: string, state: string, withoutIt: string }} Seam
 * @typedef {{ state: string, message: string, rows: { name: string, expected: number, traced: number }[] }} SelfCheck
 * @typedef {{ version: string, patchers: string, vramState: string, reserve: number }} Host
 *
 * @typedef {object} Status
 * @property {string} version
 * @property {number | null} takenAt seconds of the server's clock: of two the higher is the newer
 * @property {Device[]} devices
 * @property {Pipeline[]} pipelines
 * @property {LoadedModel[]} models
 * @property {Memory | null} ram
 * @property {Waiting[]} waiting
 * @property {Host | null} host
 * @property {Seam[]} seams
 * @property {SelfCheck | null} selfCheck
 */

const ROLES = ["generator", "text_encoder", "vae", "clip_vision", "other"];
const PLACEMENTS = ["gpu", "cpu", "partial"];
const STATES = ["active", "idle", "offloaded"];

/** @param {unknown} json @returns {Status} */
export function readStatus(json) {
  const body = object(json, "the answer");
  return {
    version: text(body.version, ""),
    takenAt: numberOrNull(body.taken_at),
    devices: list(body.devices, "devices").map(device).filter((d) => d !== null),
    pipelines: list(body.pipelines ?? [], "pipelines").map(pipeline),
    models: list(body.loaded_models ?? [], "loaded_models").map(loadedModel),
    ram: memory(body.ram),
    waiting: objects(body.waiting).map(waiting),
    host: host(body.host),
    seams: objects(body.seams).map(seam),
    selfCheck: selfCheck(body.self_check),
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
    name: text(p.name, t("unnamed_pipeline")),
    state: /** @type {PipelineState} */ (oneOf(p.state, STATES, "idle")),
    components: list(p.components ?? [], "components").map(component),
  };
}

/** @param {unknown} json @returns {Component} */
function component(json) {
  const c = object(json, "a component");
  const bytes = numberOrNull(c.bytes) ?? 0;
  return {
    name: text(c.name, t("unnamed_model")),
    role: /** @type {Component["role"]} */ (oneOf(c.role, ROLES, "other")),
    placement: /** @type {Component["placement"]} */ (oneOf(c.placement, PLACEMENTS, "cpu")),
    bytes,
    bytesOnCard: numberOrNull(c.bytes_on_card) ?? 0,
    key: numberOrNull(c.key),
    dtype: text(c.dtype, ""),
    pinned: c.pinned === true,
    elastic: c.elastic === true,
    inUse: c.in_use === true,
    policy: text(c.policy, ""),
    idleSeconds: numberOrNull(c.idle_seconds),
    age: numberOrNull(c.age_seconds),
    deviceIndex: numberOrNull(c.device_index),
    nodeId: typeof c.node_id === "string" ? c.node_id : null,
  };
}

/** @param {unknown} json @returns {LoadedModel} */
function loadedModel(json) {
  const m = object(json, "a loaded model");
  return {
    name: text(m.name, t("unnamed_model")),
    file: text(m.file, ""),
    role: /** @type {Role} */ (oneOf(m.role, ROLES, "other")),
    dtype: text(m.dtype, ""),
    bytes: numberOrNull(m.bytes) ?? 0,
    bytesOnCard: numberOrNull(m.bytes_on_card) ?? 0,
    registered: m.registered === true,
    inUse: m.in_use === true,
    pinned: m.pinned === true,
    elastic: m.elastic === true,
    key: numberOrNull(m.key),
    deviceIndex: numberOrNull(m.device_index),
    age: numberOrNull(m.age_seconds),
  };
}

/** @param {unknown} json @returns {Memory | null} */
function memory(json) {
  if (!isObject(json)) return null;
  const total = numberOrNull(json.total_bytes);
  const available = numberOrNull(json.available_bytes);
  if (total === null || available === null || total <= 0) return null;
  return { total, available, limit: numberOrNull(json.limit_bytes), ours: numberOrNull(json.ours_bytes) };
}

/** @param {Record<string, unknown>} w @returns {Waiting} */
function waiting(w) {
  return { id: text(w.id, ""), action: text(w.action, ""), key: numberOrNull(w.key), seconds: numberOrNull(w.waited_seconds) ?? 0 };
}

/** @param {unknown} json @returns {Host | null} */
function host(json) {
  if (!isObject(json)) return null;
  return {
    version: text(json.comfyui_version, "?"),
    patchers: text(json.patchers, "?"),
    vramState: text(json.vram_state, "?"),
    reserve: numberOrNull(json.reserve_bytes) ?? 0,
  };
}

/** @param {Record<string, unknown>} s @returns {Seam} */
function seam(s) {
  return { name: text(s.name, "?"), state: oneOf(s.state, ["live", "absent", "off"], "absent"), withoutIt: text(s.without_it, "") };
}

/** @param {unknown} json @returns {SelfCheck | null} */
function selfCheck(json) {
  if (!isObject(json)) return null;
  const rows = objects(json.rows).map((row) => ({
    name: text(row.name, "?"),
    expected: numberOrNull(row.expected) ?? 0,
    traced: numberOrNull(row.traced) ?? 0,
  }));
  return { state: text(json.state, ""), message: text(json.message, ""), rows };
}
