// The bar in the top menu.

import { Details, LEGEND } from "./details.js";
import { followTheme, h, icon, markTheme, setAttribute, setText } from "./dom.js";
import { Levels } from "./levels.js";
import { detailsOf, readingOf } from "./reading.js";
import { t } from "./strings.js";

/**
 * @import { IconName } from "./dom.js"
 * @import { Device } from "./status.js"
 * @import { Reading, View } from "./reading.js"
 * @import { Key } from "./strings.js"
 * @import { Snapshot } from "./status_client.js"
 *
 * @typedef {Omit<View, "level"> & { criticalAt: number }} BarChoices
 */

export const BAR_ID = "vram-headroom-bar";

/** @type {Readonly<Record<NonNullable<Reading["level"]>, IconName>>} */
const LEVEL_ICONS = Object.freeze({ ok: "card", high: "card_warning", very_high: "triangle", critical: "octagon" });

/** Verdicts as the last check's words. @type {Readonly<Record<string, Key>>} */
const VERDICT_KEYS = Object.freeze({
  fits: "verdict_fits",
  fits_with_offload: "verdict_fits_with_offload",
  does_not_fit: "verdict_does_not_fit",
  unknown: "verdict_unknown",
});

export class Bar {
  element;
  /** @type {(device: Device) => void} a card has become critical */
  onCritical = () => {};
  /** @type {(reading: Reading) => void} after something changed in what is shown */
  onReading = () => {};
  #meter;
  #icon = h("span", { class: "vrh-icons" });
  #segments = LEGEND.map(([kind]) => h("i", { "data-kind": kind }));
  #headline = h("b", {});
  #word = h("span", { class: "vrh-level" });
  #amount = h("span", { class: "vrh-amount" });
  #live = h("span", { class: "vrh-spoken", role: "status", "aria-live": "polite" });
  #details = new Details();
  #levels = new Levels();
  /** @type {View} */
  #view = { shows: "pressure", card: "fullest", pollSeconds: 3, level: (device) => this.#levels.of(device) };
  /** @type {Snapshot} */
  #snapshot = { state: "loading", status: null, reason: "" };
  /** @type {IconName | null} */
  #iconName = null;
  #lastCheck = "";
  #updates = 0;
  #stopTheme = () => {};

  constructor() {
    this.#meter = h(
      "div",
      { class: "vrh-meter" },
      this.#icon,
      h("div", { class: "vrh-track" }, ...this.#segments),
      h("span", { class: "vrh-words" }, this.#headline, this.#word, this.#amount),
    );
    // A button would hide the meter's role from screen readers if it contained it, so it lies over it instead.
    this.element = h("div", { id: BAR_ID, class: "vrh-bar" }, this.#meter, this.#details.button, this.#live, this.#details.panel);
    this.#details.onOpen = () => this.#fillDetails();
    this.show(this.#snapshot);
  }

  /** @param {(card: View["card"]) => void} chosen a person wants this card in the bar */
  set onCard(chosen) {
    this.#details.onCard = chosen;
  }

  /** To be called once the bar stands in the page. */
  followTheme() {
    this.#stopTheme = followTheme(this.element);
  }

  /** @param {BarChoices} choices */
  choose({ shows, card, pollSeconds, criticalAt }) {
    this.#view = { ...this.#view, shows, card, pollSeconds };
    this.#levels.criticalAt = criticalAt;
    this.show(this.#snapshot);
  }

  /** @param {Snapshot} snapshot */
  show(snapshot) {
    this.#snapshot = snapshot;
    const crossed = snapshot.state === "ok" ? this.#levels.update(snapshot.status?.devices ?? []) : [];
    const reading = readingOf(snapshot, this.#view);
    this.#details.label();
    const before = this.element.dataset.level;
    if (this.#draw(reading)) {
      // the menu is mounted later than the bar is made; asking for colours at every reading would cost a layout each time
      if (!this.element.dataset.theme) markTheme(this.element);
      this.#updates += 1;
      this.element.dataset.updates = String(this.#updates);
      this.onReading(reading);
    }
    const level = reading.level ?? "";
    if (!level) setText(this.#live, "");
    else if (before && before !== level) setText(this.#live, reading.spoken);
    if (this.#details.isOpen) this.#fillDetails();
    for (const device of crossed) this.onCritical(device);
  }

  /** @param {string} note how the last check before queueing went */
  showCheck(note) {
    this.#lastCheck = note;
    setAttribute(this.element, "data-last-check", note);
    if (this.#details.isOpen) this.#fillDetails();
  }

  /** For the ear, in the one polite place this pack has. @param {string} text */
  say(text) {
    setText(this.#live, text);
  }

  remove() {
    this.#stopTheme();
    this.#details.close();
    this.element.remove();
  }

  /** @param {Reading} reading @returns {boolean} whether anything changed */
  #draw(reading) {
    const { device, shares } = reading;
    const facts = {
      "data-state": reading.state,
      "data-level": reading.level ?? "",
      "data-pressure": String(reading.pressure ?? ""),
      "data-used-bytes": String(device?.used ?? ""),
      "data-total-bytes": String(device?.total ?? ""),
      "data-stale": reading.stale ? "true" : null,
      "data-reason": this.#snapshot.reason || null,
    };
    const changed = Object.entries(facts).some(([name, value]) => this.element.getAttribute(name) !== value);
    const moved = setMeter(this.#meter, reading);
    for (const [name, value] of Object.entries(facts)) setAttribute(this.element, name, value);
    this.#drawIcon(reading);
    setText(this.#headline, reading.headline);
    setText(this.#word, reading.word);
    setText(this.#amount, reading.amount);
    const widths = [shares?.inUse ?? 0, shares?.reclaimable ?? 0, shares?.others ?? 0];
    this.#segments.forEach((segment, i) => setAttribute(segment, "style", `width: ${widths[i]}%`));
    return changed || moved;
  }

  /** @param {Reading} reading */
  #drawIcon({ level, state }) {
    const failed = state === "error" || state === "disconnected";
    const name = level ? LEVEL_ICONS[level] : failed ? "card_warning" : "card";
    if (this.#iconName === name) return;
    this.#iconName = name;
    this.#icon.replaceChildren(icon(name, "vrh-icon"));
  }

  #fillDetails() {
    const sections = detailsOf(this.#snapshot, this.#view);
    if (this.#lastCheck) sections.push({ title: t("last_check", { outcome: checkWords(this.#lastCheck) }), rows: [] });
    const devices = this.#snapshot.state === "ok" ? (this.#snapshot.status?.devices ?? []) : [];
    this.#details.fill(sections, devices, this.#view.card);
  }
}

/** @param {string} note a verdict, or why there is none */
function checkWords(note) {
  const key = Object.hasOwn(VERDICT_KEYS, note) ? VERDICT_KEYS[note] : undefined;
  return key ? t(key) : note.replaceAll("_", " ");
}

/**
 * A meter needs a value: while there is none, the same element is a labelled image of its words.
 * @param {HTMLElement} meter
 * @param {Reading} reading
 * @returns {boolean} whether it changed
 */
function setMeter(meter, reading) {
  const { figure, label, spoken } = reading;
  const known = figure !== null;
  const facts = {
    role: known ? "meter" : "img",
    "aria-label": known ? label : spoken,
    "aria-valuemin": known ? "0" : null,
    "aria-valuemax": known ? "100" : null,
    "aria-valuenow": known ? String(figure) : null,
    "aria-valuetext": known ? spoken : null,
  };
  const changed = Object.entries(facts).some(([name, value]) => meter.getAttribute(name) !== value);
  for (const [name, value] of Object.entries(facts)) setAttribute(meter, name, value);
  return changed;
}
