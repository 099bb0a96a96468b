// From a snapshot to what the bar and its details show: words, shares and the level, without touching the page.

import { deviceWords, gigabytes, levelWord, placementWords, roleWord, size, sizeOrUnknown, wholePercent } from "./text.js";

/**
 * @import { Component, Device, Pipeline, Status } from "./status.js"
 * @import { Snapshot } from "./status_client.js"
 * @import { Level } from "./levels.js"
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

/** @type {Readonly<Record<Exclude<Snapshot["state"], "ok">, { headline: string, spoken: string }>>} */
const WITHOUT_A_CARD = Object.freeze({
  loading: { headline: "VRAM …", spoken: "VRAM, waiting for the first reading" },
  no_gpu: { headline: "No GPU", spoken: "No GPU: ComfyUI runs on the CPU" },
  error: { headline: "VRAM ?", spoken: "VRAM not known" },
  disconnected: { headline: "VRAM offline", spoken: "VRAM not known" },
});

/** @param {Snapshot} snapshot @param {View} view @returns {Reading} */
export function readingOf(snapshot, view) {
  const device = snapshot.state === "ok" && snapshot.status ? chosen(snapshot.status.devices, view.card) : null;
  if (device) return cardReading(device, view, (snapshot.status?.devices.length ?? 0) > 1);
  const state = snapshot.state === "ok" ? "no_gpu" : snapshot.state;
  const { headline, spoken } = WITHOUT_A_CARD[state];
  return {
    state,
    level: null,
    figure: null,
    pressure: null,
    label: "VRAM",
    headline,
    word: "",
    amount: "",
    spoken: snapshot.reason ? `${spoken}: ${snapshot.reason}` : spoken,
    shares: null,
    device: null,
    stale: false,
  };
}

/** What the bar's details list. @param {Snapshot} snapshot @param {View} view @returns {Section[]} */
export function detailsOf(snapshot, view) {
  const { state, status, reason } = snapshot;
  if (state === "loading") return [note("Waiting for the first reading")];
  if (state === "error" || state === "disconnected") return [note(`No reading: ${reason}. Trying again every ${view.pollSeconds} s.`)];
  if (!status || status.devices.length === 0) return [note("No GPU: ComfyUI runs on the CPU, so there is no VRAM to watch.")];
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
  const figure = view.shows === "used" ? used : pressure;
  const held = `${gigabytes(device.used)} of ${size(device.total)}`;
  const amount = level === "critical" ? `${size(device.reclaimableFree)} left` : held;
  const name = several ? `GPU ${device.index}, ` : "";
  const told = view.shows === "used" ? `VRAM ${used} percent used, pressure ${pressure} percent` : `VRAM pressure ${pressure} percent`;
  return {
    state: "ok",
    level,
    figure,
    pressure,
    label: view.shows === "used" ? "VRAM used" : "VRAM pressure",
    headline: view.shows === "used" ? `${figure} % used` : `${figure} %`,
    word: levelWord(level),
    amount: [several ? `GPU ${device.index}:` : "", amount, device.stale ? "(old)" : ""].filter(Boolean).join(" "),
    spoken: `${name}${told}, ${levelWord(level) || "ok"}, ${held} used${device.stale ? ", an old reading" : ""}`,
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
    { label: "Pressure", value: `${wholePercent(device.pressure)} %${level ? `, ${level}` : ""}` },
    { label: "Total", value: size(device.total) },
    { label: "Used", value: `${size(device.used)} (${wholePercent((100 * device.used) / device.total)} %)` },
    { label: "Free", value: size(device.free) },
    { label: "Can be given back", value: size(Math.max(0, device.reclaimableFree - device.free)) },
    { label: "Reserved", value: sizeOrUnknown(device.reserved) },
    { label: "Active", value: sizeOrUnknown(device.active) },
    { label: "ComfyUI", value: sizeOrUnknown(device.ours) },
    { label: "Other programs", value: sizeOrUnknown(device.others) },
  ];
  if (device.stale) rows.push({ label: "Reading", value: `${Math.round(device.age)} s old` });
  return { title: several ? deviceWords(device) : device.name, rows };
}

/** @param {Pipeline} pipeline @returns {Section} */
function pipelineSection(pipeline) {
  return {
    title: `Pipeline ${pipeline.name}, ${pipeline.state}`,
    dot: pipeline.state,
    rows: pipeline.components.map((component) => {
      const dot = dotOf(component, pipeline.state);
      const { name, role, bytes } = component;
      return { label: `${name} (${roleWord(role)})`, value: `${size(bytes)}, ${placementWords(component)}, ${dot}`, dot };
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
      return { label: m.name, value: `${size(m.bytesOnCard)} of ${size(m.bytes)} on the card, ${dot}`, dot };
    });
  return rows.length ? [{ title: "Other models ComfyUI holds", rows }] : [];
}

/** @param {string} text @returns {Section} */
function note(text) {
  return { title: text, rows: [] };
}
