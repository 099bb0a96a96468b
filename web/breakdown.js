// What fills a card, as parts that add up to its total: weights by role, computing, other programs, free; what can be given back marked.

import { roleWord } from "./text.js";
import { t } from "./strings.js";

/**
 * @import { Device, Role, Status } from "./status.js"
 *
 * @typedef {Role | "work" | "cached" | "others" | "reserve" | "free"} Kind
 * @typedef {{ kind: Kind, label: string, bytes: number, back: boolean }} Part `back`: given back when somebody needs it
 * @typedef {{ role: Role, bytes: number, held: boolean }} Weights `held`: in use or pinned
 */

/** @type {readonly Role[]} */
const ROLES = Object.freeze(["generator", "text_encoder", "vae", "clip_vision", "other"]);

/** @param {Status} status @param {Device} device @returns {Part[]} none of them empty */
export function breakdownOf(status, device) {
  const { total } = device;
  const used = within(device.used, total);
  const others = within(device.others ?? (device.ours === null ? 0 : used - device.ours), used);
  const back = within(device.reclaimableFree - device.free, used - others);
  const weights = weightsOn(status, device.index);
  // what cannot be given back, and what can: each is filled with weights first, and the rest has no owner among the models
  let held = used - others - back;
  let loose = back;
  /** @type {Part[]} */
  const solid = [];
  /** @type {Part[]} */
  const hatched = [];
  for (const role of ROLES) {
    const own = weights.filter((w) => w.role === role);
    const all = sum(own.map((w) => w.bytes));
    const kept = Math.min(held, sum(own.filter((w) => w.held).map((w) => w.bytes)));
    const given = Math.min(loose, all - kept);
    held -= kept;
    loose -= given;
    solid.push({ kind: role, label: roleWord(role), bytes: kept, back: false });
    hatched.push({ kind: role, label: t("legend_back", { label: roleWord(role) }), bytes: given, back: true });
  }
  const work = device.ours === null && device.active === null ? t("part_unknown") : t("part_activations");
  const free = total - used;
  const reserve = within(status.host?.reserve ?? 0, free);
  return [
    ...solid,
    { kind: /** @type {const} */ ("work"), label: work, bytes: held, back: false },
    ...hatched,
    { kind: /** @type {const} */ ("cached"), label: t("legend_back", { label: t("part_cached") }), bytes: loose, back: true },
    { kind: /** @type {const} */ ("others"), label: t("part_others"), bytes: others, back: false },
    { kind: /** @type {const} */ ("reserve"), label: t("part_reserve"), bytes: reserve, back: false },
    { kind: /** @type {const} */ ("free"), label: t("part_free"), bytes: free - reserve, back: false },
  ].filter((part) => part.bytes > 0);
}

/** Every model once, whether registered, known to ComfyUI, or both. @param {Status} status @param {number} index of the card @returns {Weights[]} */
function weightsOn(status, index) {
  const components = status.pipelines.flatMap((pipeline) => pipeline.components);
  const pinned = new Set(components.filter((c) => c.pinned && c.key !== null).map((c) => c.key));
  const listed = new Set(status.models.map((m) => m.key).filter((key) => key !== null));
  const models = status.models.map((m) => ({ ...m, pinned: m.pinned || (m.key !== null && pinned.has(m.key)) }));
  return [...models, ...components.filter((c) => c.key === null || !listed.has(c.key))]
    .filter((m) => (m.deviceIndex ?? status.devices[0]?.index) === index)
    .map((m) => ({ role: m.role, bytes: m.bytesOnCard, held: m.inUse || m.pinned }));
}

/** @param {number} value @param {number} most */
function within(value, most) {
  return Math.min(Math.max(0, value), Math.max(0, most));
}

/** @param {number[]} values */
function sum(values) {
  return values.reduce((total, value) => total + value, 0);
}
