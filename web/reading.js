// From a snapshot to what the bar and its details show: words, shares and the level, without touching the page.

import { t } from "./strings.js";
import { deviceWords, gigabytes, levelWord, placementWords, roleWord, size, sizeOrUnknown, wholePercent } from "./text.js";

/**
 * @import { Component, Device, Pipeline, Status } from "./status.js"
 * @import { Snapshot } from "./status_client.js"
 * @import { Level } from "./levels.js"
 * @import { Key } from "./strings.js"
 *
 * @typedef {{ inUse: number, reclaimable: number, others: number }} Shares percent of the card; the rest is free
 *
 * @typedef {object} View how a person wants it
 * @property {"pressure" | "used"} shows which percentage is the figure
 * @property {number | "fullest"} card
 * @property {(device: Device) => Level} level
 * @property {number} pollSeconds
 *
 * @typedef {object} Reading
 * @property {Snapshot["state"]} state
 * @property {Level | null} level null where there is nothing to judge
 * @property {number | null} figure percent, as shown
 * @property {number | null} pressure percent
 * @property {string} label of the figure
 * @property {string} headline the bold word or figure
 * @property {string} word what the level is called, may be ""
 * @property {string} amount what stands beside it, may be ""
 * @property {string} spoken what a screen reader says for it
 * @property {Shares | null} shares
 * @property {Device | null} device the one shown
 * @property {boolean} stale
 *
 * @typedef {"active" | "idle" | "offloaded"} Dot green, amber, grey
 * @typedef {{ label: string, value: string, dot?: Dot }} Row
 * @typedef {{ title: string, rows: Row[], dot?: Dot }} Section
 */

/** @type {Readonly<Record<Exclude<Snapshot["state"], "ok">, { headline: Key, spoken: Key }>>} */
const WITHOUT_A_CARD = Object.freeze({
  loading: { headline: "bar_loading", spoken: "spoken_loading" },
  no_gpu: { headline: "bar_no_gpu", spoken: "spoken_no_gpu" },
  error: { headline: "bar_error", spoken: "spoken_unknown" },
  disconnected: { headline: "bar_offline", spoken: "spoken_unknown" },
});

/** @type {Readonly<Record<Dot, Key>>} */
const DOT_KEYS = Object.freeze({ active: "dot_active", idle: "dot_idle", offloaded: "dot_offloaded" });

/** @param {Snapshot} snapshot @param {View} view @returns {Reading} */
export function readingOf(snapshot, view) {
  const device = snapshot.state === "ok" && snapshot.status ? chosen(snapshot.status.devices, view.card) : null;
  if (device) return cardReading(device, view, (snapshot.status?.devices.length ?? 0) > 1);
  const state = snapshot.state === "ok" ? "no_gpu" : snapshot.state;
  const keys = WITHOUT_A_CARD[state];
  const spoken = t(keys.spoken);
  return {
    state,
    level: null,
    figure: null,
    pressure: null,
    label: t("bar_name"),
    headline: t(keys.headline),
    word: "",
    amount: "",
    spoken: snapshot.reason ? t("spoken_because", { told: spoken, reason: snapshot.reason }) : spoken,
    shares: null,
    device: null,
    stale: false,
  };
}

/** What the bar's details list. @param {Snapshot} snapshot @param {View} view @returns {Section[]} */
export function detailsOf(snapshot, view) {
  const { state, status, reason } = snapshot;
  if (state === "loading") return [note(t("details_waiting"))];
  if (state === "error" || state === "disconnected") return [note(t("no_reading", { reason, seconds: view.pollSeconds }))];
  if (!status || status.devices.length === 0) return [note(t("no_gpu"))];
  const several = status.devices.length > 1;
  return [
    ...status.devices.map((device) => deviceSection(device, view, several)),
    ...status.pipelines.map(pipelineSection),
    ...otherModels(status),
  ];
}

/** @param {Device[]} devices @param {View["card"]} card @returns {Device | null} */
function chosen(devices, card) {
  const wanted = devices.find((d) => d.index === card);
  if (wanted) return wanted;
  return devices.reduce((/** @type {Device | null} */ most, d) => (most && most.pressure >= d.pressure ? most : d), null);
}

/** @param {Device} device @param {View} view @param {boolean} several @returns {Reading} */
function cardReading(device, view, several) {
  const level = view.level(device);
  const pressure = wholePercent(device.pressure);
  const used = wholePercent((100 * device.used) / device.total);
  const showsUsed = view.shows === "used";
  const figure = showsUsed ? used : pressure;
  const held = t("bar_held", { used: gigabytes(device.used), total: size(device.total) });
  const alone = level === "critical" ? t("bar_left", { size: size(device.reclaimableFree) }) : held;
  const amount = several ? t("bar_amount_of_card", { index: device.index, amount: alone }) : alone;
  const facts = { used, pressure, level: levelWord(level) || t("level_ok"), held };
  const told = t(showsUsed ? "spoken_used" : "spoken_pressure", facts);
  const spoken = several ? t("spoken_of_card", { index: device.index, told }) : told;
  return {
    state: "ok",
    level,
    figure,
    pressure,
    label: t(showsUsed ? "bar_used" : "bar_pressure"),
    headline: showsUsed ? t("bar_percent_used", { used }) : `${figure} %`,
    word: levelWord(level),
    amount: device.stale ? t("bar_amount_old", { amount }) : amount,
    spoken: device.stale ? t("spoken_old", { told: spoken }) : spoken,
    shares: sharesOf(device),
    device,
    stale: device.stale,
  };
}

/**
 * In use and others are what cannot be given back, so together they are the pressure.
 * Whoever cannot be told apart counts as in use.
 * @param {Device} device
 * @returns {Shares}
 */
function sharesOf(device) {
  const { total, free } = device;
  const used = clamp(device.used, total);
  const reclaimable = clamp(device.reclaimableFree - free, used);
  const others = clamp(device.others ?? (device.ours === null ? 0 : used - device.ours), used - reclaimable);
  const inUse = used - reclaimable - others;
  /** @param {number} bytes */
  const share = (bytes) => Math.round((1000 * bytes) / total) / 10;
  return { inUse: share(inUse), reclaimable: share(reclaimable), others: share(others) };
}

/** @param {number} value @param {number} most */
function clamp(value, most) {
  return Math.min(Math.max(0, value), Math.max(0, most));
}

/** @param {Device} device @param {View} view @param {boolean} several @returns {Section} */
function deviceSection(device, view, several) {
  const level = levelWord(view.level(device));
  const rows = [
    { label: t("fact_pressure"), value: `${wholePercent(device.pressure)} %${level ? `, ${level}` : ""}` },
    { label: t("fact_total"), value: size(device.total) },
    { label: t("fact_used"), value: `${size(device.used)} (${wholePercent((100 * device.used) / device.total)} %)` },
    { label: t("fact_free"), value: size(device.free) },
    { label: t("fact_back"), value: size(Math.max(0, device.reclaimableFree - device.free)) },
    { label: t("fact_reserved"), value: sizeOrUnknown(device.reserved) },
    { label: t("fact_active"), value: sizeOrUnknown(device.active) },
    { label: t("fact_ours"), value: sizeOrUnknown(device.ours) },
    { label: t("fact_others"), value: sizeOrUnknown(device.others) },
  ];
  if (device.stale) rows.push({ label: t("fact_reading"), value: t("fact_age", { seconds: Math.round(device.age) }) });
  return { title: several ? deviceWords(device) : device.name, rows };
}

/** @param {Pipeline} pipeline @returns {Section} */
function pipelineSection(pipeline) {
  return {
    title: t("details_pipeline", { name: pipeline.name, state: t(DOT_KEYS[pipeline.state]) }),
    dot: pipeline.state,
    rows: pipeline.components.map((component) => {
      const dot = dotOf(component, pipeline.state);
      const { name, role, bytes } = component;
      const value = t("details_placed", { size: size(bytes), placement: placementWords(component), state: t(DOT_KEYS[dot]) });
      return { label: t("details_component", { name, role: roleWord(role) }), value, dot };
    }),
  };
}

/** @param {Component} component @param {Pipeline["state"]} state @returns {Dot} */
function dotOf(component, state) {
  if (component.placement === "cpu") return "offloaded";
  return state === "active" ? "active" : "idle";
}

/** @param {Status} status @returns {Section[]} */
function otherModels(status) {
  const rows = status.models
    .filter((m) => !m.registered)
    .map((m) => {
      const dot = /** @type {Dot} */ (m.bytesOnCard === 0 ? "offloaded" : m.inUse ? "active" : "idle");
      const value = t("details_other", { size: size(m.bytesOnCard), total: size(m.bytes), state: t(DOT_KEYS[dot]) });
      return { label: m.name, value, dot };
    });
  return rows.length ? [{ title: t("details_others"), rows }] : [];
}

/** @param {string} text @returns {Section} */
function note(text) {
  return { title: text, rows: [] };
}
