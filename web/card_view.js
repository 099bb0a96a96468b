// A card, or the machine's memory, as one stacked bar with a legend in words and figures.

import { breakdownOf } from "./breakdown.js";
import { h } from "./dom.js";
import { levelOf } from "./levels.js";
import { t } from "./strings.js";
import { gigabytes, levelWord, size, wholePercent } from "./text.js";

/**
 * @import { Device, Memory, Status } from "./status.js"
 *
 * @typedef {{ kind: string, label: string, bytes: number, back: boolean }} Part
 * @typedef {{ title: string, figures: string, note: string, parts: Part[], total: number }} Stack
 */

/** @param {Status} status @param {Device} device @param {number} criticalAt percent @returns {Stack} */
export function cardStack(status, device, criticalAt) {
  const several = status.devices.length > 1;
  const name = several ? t("card_title_of_several", { index: device.index, name: device.name }) : t("card_title", { name: device.name });
  const word = levelWord(levelOf(device.pressure, criticalAt));
  return {
    title: `${name} · ${size(device.total)}`,
    figures: t("pressure_and_used", {
      pressure: wholePercent(device.pressure),
      level: word ? `, ${word}` : "",
      used: wholePercent((100 * device.used) / device.total),
    }),
    note: device.stale ? t("old_reading", { seconds: Math.round(device.age) }) : "",
    parts: breakdownOf(status, device),
    total: device.total,
  };
}

/** @param {Memory} memory @returns {Stack} */
export function memoryStack({ total: machine, available, limit, ours }) {
  const total = limit !== null && limit < machine ? limit : machine;
  const free = Math.min(available, total);
  const own = Math.min(ours ?? 0, total - free);
  const parts = [
    { kind: "ours", label: t("ram_ours"), bytes: own, back: false },
    { kind: "others", label: t("ram_others"), bytes: total - free - own, back: false },
    { kind: "free", label: t("ram_free"), bytes: free, back: false },
  ];
  const of = total < machine ? t("ram_limit", { total: size(total), machine: size(machine) }) : t("ram_of", { total: size(total) });
  return { title: t("ram_title"), figures: `${gigabytes(total - free)} ${of}`, note: "", parts: parts.filter((p) => p.bytes > 0), total };
}

/** @param {Stack} stack */
export function drawStack({ title, figures, note, parts, total }) {
  const told = parts.map(({ label, bytes }) => `${label} ${size(bytes)}`);
  /** @param {Part} part */
  const look = ({ kind, back }) => ({ "data-kind": kind, ...(back ? { "data-back": "true" } : {}) });
  const segments = parts
    .filter((part) => part.kind !== "free")
    .map((part) => h("i", { ...look(part), style: `width:${Math.round((10_000 * part.bytes) / total) / 100}%` }));
  return h(
    "section",
    { class: "vrh-stack-block" },
    h("div", { class: "vrh-line" }, h("h3", {}, title), h("span", {}, figures)),
    h("div", { class: "vrh-stack", role: "img", "aria-label": `${t("stack_name", { card: title })}: ${told.join(", ")}` }, ...segments),
    h("ul", { class: "vrh-parts" }, ...parts.map((part) => h("li", {}, h("i", look(part)), part.label, " ", h("b", {}, size(part.bytes))))),
    ...(note ? [h("p", {}, note)] : []),
  );
}
