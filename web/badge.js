// The badge of App Mode, where the menu with the bar is hidden.

import { followed, isInAppMode } from "./comfy.js";
import { t } from "./strings.js";

/** @import { Reading } from "./reading.js" */

/** @type {Readonly<Record<string, ComfyBadge["variant"]>>} */
const VARIANTS = Object.freeze({ high: "warning", very_high: "warning", critical: "error" });

export class Badge {
  #shown = { text: "", level: "", spoken: "" };

  /** To be called once the front end is there. */
  connect() {
    this.#shown = followed("AppMode", { ...this.#shown });
  }

  /** @param {Reading | null} reading null: nothing is to be shown */
  show(reading) {
    const text = reading ? [headlineOf(reading), reading.word].filter(Boolean).join(" ") : "";
    if (this.#shown.text === text) return;
    this.#shown.text = text;
    this.#shown.level = reading?.level ?? "";
    this.#shown.spoken = reading?.spoken ?? "";
  }

  /** @returns {ComfyBadge[]} */
  get badges() {
    // asked first: what is not read here does not make the front end draw again when it changes
    if (!isInAppMode()) return [];
    const { text, level, spoken } = this.#shown;
    if (!text) return [];
    return [{ text, variant: VARIANTS[level] ?? "info", icon: "pi pi-microchip", tooltip: spoken }];
  }
}

/** A bare figure says what it is of. @param {Reading} reading */
function headlineOf({ figure, headline }) {
  return figure === null ? headline : t("badge_in_app", { headline });
}
