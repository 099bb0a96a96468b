// Bands of pressure, and the crossing of the critical one: a card that hovers around it is told of once.

/** @import { Device } from "./status.js" */
/** @typedef {"ok" | "high" | "very_high" | "critical"} Level */

/** In percent: green below `high`, amber below `veryHigh`, red from there. */
export const BANDS = Object.freeze({ high: 60, veryHigh: 80 });

/** Where the warning comes unless the settings say otherwise. */
export const CRITICAL_AT = 90;

/** Percent below the mark at which a critical card is one no longer. Our choice: about one text encoder's step on 16 GB. */
export const HYSTERESIS = 5;

/**
 * @param {number} pressure percent
 * @param {number} [criticalAt] percent
 * @param {boolean} [wasCritical]
 * @returns {Level}
 */
export function levelOf(pressure, criticalAt = CRITICAL_AT, wasCritical = false) {
  if (pressure >= criticalAt || (wasCritical && pressure >= criticalAt - HYSTERESIS)) return "critical";
  if (pressure >= BANDS.veryHigh) return "very_high";
  return pressure >= BANDS.high ? "high" : "ok";
}

/** The levels of all cards, from reading to reading. */
export class Levels {
  criticalAt = CRITICAL_AT;
  /** @type {Map<number, Level>} by index of the card */
  #levels = new Map();

  /**
   * @param {Device[]} devices
   * @returns {Device[]} those that have become critical by this reading
   */
  update(devices) {
    const before = this.#levels;
    this.#levels = new Map(devices.map((d) => [d.index, levelOf(d.pressure, this.criticalAt, before.get(d.index) === "critical")]));
    return devices.filter((d) => this.of(d) === "critical" && before.get(d.index) !== "critical");
  }

  /** @param {Device} device @returns {Level} */
  of(device) {
    return this.#levels.get(device.index) ?? levelOf(device.pressure, this.criticalAt);
  }
}
