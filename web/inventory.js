// The models of a status as rows for the panel's list: what they are, where they are, and what can be done with them just now.

import { t } from "./strings.js";
import { roleWord, size, wholePercent } from "./text.js";

/**
 * @import { Component, LoadedModel, Pipeline, Status } from "./status.js"
 * @import { Dot } from "./reading.js"
 *
 * @typedef {"offload" | "pin" | "unpin" | "free"} ActionName
 * @typedef {{ name: ActionName, label: string, spoken: string, reason: string, waits: string }} Action `reason`: why it can't be done now, or ""
 * @typedef {{ id: string, key: number | null, name: string, dot: Dot, dotWords: string, size: string, facts: string, state: string, actions: Action[] }} Row
 * @typedef {{ id: string, title: string, state: string, dot: Dot | null, rows: Row[] }} Group
 * @typedef {{ groups: Group[], free: Action }} Inventory
 *
 * @typedef {object} Pending what is known of an action before the server's next reading
 * @property {ActionName} action
 * @property {number | null} key
 * @property {"asked" | "node" | "queue"} state
 */

/** @type {Readonly<Record<Pipeline["state"], "pipeline_active" | "pipeline_idle" | "pipeline_offloaded">>} */
const STATE_KEYS = Object.freeze({ active: "pipeline_active", idle: "pipeline_idle", offloaded: "pipeline_offloaded" });

/** @type {Readonly<Record<Pipeline["state"], Dot>>} */
const STATE_DOTS = Object.freeze({ active: "active", idle: "idle", offloaded: "offloaded" });

/** @param {Status} status @param {readonly Pending[]} [pending] @returns {Inventory} */
export function inventoryOf(status, pending = []) {
  const byKey = new Map(status.models.flatMap((m) => (m.key === null ? [] : [[m.key, m]])));
  const groups = status.pipelines.map((pipeline, at) => ({
    id: `pipeline ${pipeline.name}`,
    title: pipeline.name,
    state: t(STATE_KEYS[pipeline.state]),
    dot: STATE_DOTS[pipeline.state],
    rows: pipeline.components.map((c, i) => {
      const model = c.key === null ? undefined : byKey.get(c.key);
      const facts = { ...c, dtype: c.dtype || (model?.dtype ?? ""), age: c.age ?? model?.age ?? null };
      return rowOf(`${at} ${i} ${c.key ?? c.name}`, c.name, facts, c.idleSeconds, status, pending);
    }),
  }));
  const others = status.models.filter((m) => !m.registered);
  if (others.length) {
    const rows = others.map((m, i) => rowOf(`m${i} ${m.key ?? m.name}`, nameOf(m), m, null, status, pending));
    groups.push({ id: "others", title: t("models_other"), state: "", dot: /** @type {any} */ (null), rows });
  }
  return { groups, free: freeAction(status, pending) };
}

/** The file says more than the class: "wan2.2_t2v_high_noise_14B_fp8_scaled". @param {LoadedModel} model */
function nameOf({ file, name }) {
  const base = file.split(/[\\/]/).at(-1) ?? "";
  return base.replace(/\.(safetensors|sft|gguf|pth?|ckpt|bin)$/i, "") || name;
}

/**
 * @typedef {Pick<Component, "role" | "bytes" | "bytesOnCard" | "dtype" | "pinned" | "elastic" | "inUse" | "key" | "age">} Facts
 *
 * @param {string} id
 * @param {string} name
 * @param {Facts} model
 * @param {number | null} idleSeconds
 * @param {Status} status
 * @param {readonly Pending[]} pending
 * @returns {Row}
 */
function rowOf(id, name, model, idleSeconds, status, pending) {
  const dot = model.bytesOnCard === 0 ? "offloaded" : model.inUse ? "active" : "idle";
  const used = model.inUse ? t("in_use") : idleSeconds === null ? "" : usedWords(idleSeconds);
  return {
    id,
    key: model.key,
    name,
    dot,
    dotWords: t(STATE_KEYS[dot]),
    size: size(model.bytes),
    facts: [roleWord(model.role), model.dtype, placed(model)].filter(Boolean).join(" · "),
    state: [model.pinned ? t("pinned") : "", used].filter(Boolean).join(" · "),
    actions: [
      action("offload", name, model.key, whyNotOffload(model), status, pending),
      action(model.pinned ? "unpin" : "pin", name, model.key, model.key === null ? t("because_unknown") : "", status, pending),
    ],
  };
}

/** Where a model is; of one whose pages come and go, how old that figure is. @param {Facts} model */
function placed(model) {
  const { bytes, bytesOnCard, elastic, age } = model;
  const words = placementOf(bytes, bytesOnCard);
  return elastic && age !== null && age >= 1 ? t("as_of", { placement: words, age: duration(age) }) : words;
}

/** @param {number} bytes @param {number} bytesOnCard */
export function placementOf(bytes, bytesOnCard) {
  if (bytesOnCard <= 0) return t("in_ram");
  if (bytesOnCard >= bytes) return t("on_the_card");
  return t("share_on_the_card", { percent: wholePercent((100 * bytesOnCard) / bytes) });
}

/** @param {Facts} model */
function whyNotOffload({ key, inUse, pinned, bytesOnCard }) {
  if (key === null) return t("because_unknown");
  if (inUse) return t("because_in_use");
  if (pinned) return t("because_pinned");
  return bytesOnCard === 0 ? t("because_in_ram") : "";
}

/** @param {Status} status @param {readonly Pending[]} pending @returns {Action} */
function freeAction(status, pending) {
  const models = [...status.models, ...status.pipelines.flatMap((p) => p.components)].filter((m) => m.bytesOnCard > 0);
  const reason = models.length === 0 ? t("because_nothing") : models.every((m) => m.inUse || m.pinned) ? t("because_all_in_use") : "";
  return action("free", t("everything"), null, reason, status, pending);
}

/**
 * @param {ActionName} name
 * @param {string} of whom
 * @param {number | null} key
 * @param {string} reason
 * @param {Status} status
 * @param {readonly Pending[]} pending
 * @returns {Action}
 */
function action(name, of, key, reason, status, pending) {
  const label = labelOf(name);
  const own = pending.find((p) => p.action === name && p.key === key);
  const listed = status.waiting.find((w) => w.action === name && w.key === key);
  const waits =
    own?.state === "node" || own?.state === "queue"
      ? t(own.state === "node" ? "waits_node" : "waits_queue", { action: label })
      : listed
        ? t("waits", { action: label, seconds: Math.round(listed.seconds) })
        : "";
  const why = waits ? t("because_waiting") : own ? t("because_asked") : reason;
  const words = name === "free" ? label : t("action_on", { action: label, name: of });
  return { name, label, spoken: why ? t("action_refused_because", { action: words, reason: why }) : words, reason: why, waits };
}

/** @param {ActionName} name */
export function labelOf(name) {
  return t(/** @type {const} */ ({ offload: "offload", pin: "pin", unpin: "unpin", free: "free_all" })[name]);
}

/** @param {number} seconds */
function usedWords(seconds) {
  return seconds < 60 ? t("used_just_now") : t("used_ago", { age: duration(seconds) });
}

/** In the largest whole unit: what is told coarsely changes seldom. @param {number} seconds */
export function duration(seconds) {
  if (seconds < 60) return t("seconds", { n: Math.floor(seconds) });
  return seconds < 3600 ? t("minutes", { n: Math.floor(seconds / 60) }) : t("hours", { n: Math.floor(seconds / 3600) });
}
