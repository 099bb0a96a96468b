// From a snapshot to what the bar shows: words, shares and the level, without touching the page.

import { gigabytes, levelOf, placementWords, roleWord, size, sizeOrUnknown, wholePercent } from "./text.js";

/**
 * @import { Device, Pipeline, Status } from "./answers.js"
 * @import { Snapshot } from "./status_client.js"
 * @import { Level } from "./text.js"
 *
 * @typedef {{ inUse: number, reclaimable: number, others: number }} Shares percent of the card; the rest is free
 *
 * @typedef {object} Reading
 * @property {Snapshot["state"]} state
 * @property {Level | null} level null where there is nothing to judge
 * @property {number | null} pressure
 * @property {string} headline the bold word or figure
 * @property {string} amount what stands beside it, may be ""
 * @property {string} spoken what a screen reader says for it
 * @property {Shares | null} shares
 * @property {Device | null} device the fullest one
 *
 * @typedef {{ label: string, value: string }} Row
 * @typedef {{ title: string, rows: Row[] }} Section
 */

/** @type {Readonly<Record<Exclude<Snapshot["state"], "ok">, { headline: string, spoken: string }>>} */
const WITHOUT_A_CARD = Object.freeze({
  loading: { headline: "VRAM …", spoken: "VRAM, waiting for the first reading" },
  no_gpu: { headline: "No GPU", spoken: "No GPU: ComfyUI runs on the CPU" },
  error: { headline: "VRAM ?", spoken: "VRAM not known" },
  disconnected: { headline: "VRAM ?", spoken: "VRAM not known" },
});

/** @param {Snapshot} snapshot @returns {Reading} */
export function readingOf(snapshot) {
  const device = snapshot.state === "ok" && snapshot.status ? fullest(snapshot.status.devices) : null;
  if (snapshot.state === "ok" && device) return cardReading(device);
  const state = snapshot.state === "ok" ? "no_gpu" : snapshot.state;
  const { headline, spoken } = WITHOUT_A_CARD[state];
  return {
    state,
    level: null,
    pressure: null,
    headline,
    amount: "",
    spoken: snapshot.reason ? `${spoken}: ${snapshot.reason}` : spoken,
    shares: null,
    device: null,
  };
}

/** What the bar's details list. @param {Snapshot} snapshot @returns {Section[]} */
export function detailsOf(snapshot) {
  const { state, status, reason } = snapshot;
  if (state === "loading") return [note("Waiting for the first reading")];
  if (state === "error" || state === "disconnected") return [note(`No reading: ${reason}. Trying again every 3 s.`)];
  if (!status || status.devices.length === 0) return [note("No GPU: ComfyUI runs on the CPU, so there is no VRAM to watch.")];
  return [...status.devices.map(deviceSection), ...status.pipelines.map(pipelineSection), ...otherModels(status)];
}

/** @param {Device[]} devices @returns {Device | null} */
function fullest(devices) {
  return devices.reduce((/** @type {Device | null} */ most, d) => (most && most.pressure >= d.pressure ? most : d), null);
}

/** @param {Device} device @returns {Reading} */
function cardReading(device) {
  const level = levelOf(device.pressure);
  const pressure = wholePercent(device.pressure);
  const amount = `${gigabytes(device.used)} of ${size(device.total)}`;
  return {
    state: "ok",
    level,
    pressure,
    headline: `${pressure} %`,
    amount,
    spoken: `VRAM pressure ${pressure} percent, ${level}, ${amount} used`,
    shares: sharesOf(device),
    device,
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

/** @param {Device} device @returns {Section} */
function deviceSection(device) {
  const rows = [
    { label: "Pressure", value: `${wholePercent(device.pressure)} %` },
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
  return { title: device.name, rows };
}

/** @param {Pipeline} pipeline @returns {Section} */
function pipelineSection(pipeline) {
  return {
    title: pipeline.state ? `Pipeline ${pipeline.name}, ${pipeline.state}` : `Pipeline ${pipeline.name}`,
    rows: pipeline.components.map((c) => ({
      label: `${c.name} (${roleWord(c.role)})`,
      value: `${size(c.bytes)}, ${placementWords(c)}`,
    })),
  };
}

/** @param {Status} status @returns {Section[]} */
function otherModels(status) {
  const rows = status.models
    .filter((m) => !m.registered)
    .map((m) => ({ label: m.name, value: `${size(m.bytesOnCard)} of ${size(m.bytes)} on the card` }));
  return rows.length ? [{ title: "Other models ComfyUI holds", rows }] : [];
}

/** @param {string} text @returns {Section} */
function note(text) {
  return { title: text, rows: [] };
}
