// The panel below the bar: a button toggles it; resting the pointer on the bar shows it for as long.

import { h, setAttribute } from "./dom.js";
import { t } from "./strings.js";
import { deviceWords } from "./text.js";

/**
 * @import { Device } from "./status.js"
 * @import { Dot, Section, View } from "./reading.js"
 */

const DETAILS_ID = "vram-headroom-details";
const HOVER_MS = 250;

/** The kinds of memory in the bar, with the keys of their words. */
export const LEGEND = /** @type {const} */ ([
  ["in-use", "share_in_use"],
  ["reclaimable", "share_reclaimable"],
  ["others", "part_others"],
]);

export class Details {
  button;
  panel;
  onOpen = () => {};
  /** @type {(card: View["card"]) => void} */
  onCard = () => {};
  #cards = h("div", {});
  #facts = h("div", {});
  #drawn = "";
  #drawnCards = "";
  /** @type {"closed" | "hovered" | "pinned"} */
  #mode = "closed";
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  #hoverTimer;

  constructor() {
    this.button = h("button", {
      type: "button",
      class: "vrh-button",
      "aria-expanded": "false",
      "aria-controls": DETAILS_ID,
    });
    this.panel = h(
      "div",
      { id: DETAILS_ID, class: "vrh-details", popover: "manual", role: "group", tabindex: "0" },
      this.#cards,
      this.#facts,
    );
    this.label();
    this.button.addEventListener("click", () => (this.#mode === "pinned" ? this.close() : this.#open("pinned")));
    for (const element of [this.button, this.panel]) {
      element.onpointerenter = (event) => this.#hover(event, true);
      element.onpointerleave = (event) => this.#hover(event, false);
    }
  }

  /** Again at every reading: a translation may arrive after the bar was made. */
  label() {
    for (const element of [this.button, this.panel]) setAttribute(element, "aria-label", t("details_name"));
  }

  get isOpen() {
    return this.#mode !== "closed";
  }

  close() {
    clearTimeout(this.#hoverTimer);
    if (!this.isOpen) return;
    this.#mode = "closed";
    window.removeEventListener("keydown", this.#onKey, true);
    window.removeEventListener("pointerdown", this.#onPointer, true);
    if (this.panel.isConnected) this.panel.hidePopover();
    this.button.setAttribute("aria-expanded", "false");
  }

  /** @param {Section[]} sections @param {Device[]} devices @param {View["card"]} card */
  fill(sections, devices, card) {
    this.#fillCards(devices, card);
    const drawn = JSON.stringify(sections);
    if (drawn === this.#drawn) return;
    this.#drawn = drawn;
    const legend = LEGEND.map(([kind, words]) => h("span", {}, h("i", { "data-kind": kind }), t(words)));
    this.#facts.replaceChildren(...sections.map(drawSection), h("p", { class: "vrh-legend" }, ...legend));
    if (this.isOpen) this.#place();
  }

  /** Kept apart from the figures: whoever chooses with the keyboard must not lose the focus to the next reading. @param {Device[]} devices @param {View["card"]} card */
  #fillCards(devices, card) {
    const cards = devices.length > 1 ? devices : [];
    const drawn = JSON.stringify([cards.map(deviceWords), card]);
    if (drawn === this.#drawnCards) return;
    this.#drawnCards = drawn;
    if (this.#cards.contains(document.activeElement)) return; // what is chosen is what was just clicked
    const known = cards.some((d) => d.index === card);
    const choice = (/** @type {View["card"]} */ value, /** @type {string} */ words) => {
      const input = h("input", { type: "radio", name: `${DETAILS_ID}-card`, value: String(value) });
      input.checked = value === (known ? card : "fullest");
      input.addEventListener("change", () => this.onCard(value));
      return h("label", {}, input, words);
    };
    this.#cards.replaceChildren();
    if (cards.length === 0) return;
    this.#cards.append(
      h(
        "fieldset",
        { class: "vrh-cards" },
        h("legend", {}, t("cards_legend")),
        choice("fullest", t("cards_fullest")),
        ...cards.map((d) => choice(d.index, deviceWords(d))),
      ),
    );
  }

  /** @param {"hovered" | "pinned"} mode */
  #open(mode) {
    const wasOpen = this.isOpen;
    this.#mode = mode;
    if (wasOpen) return;
    this.onOpen();
    this.panel.showPopover();
    this.#place();
    this.button.setAttribute("aria-expanded", "true");
    window.addEventListener("keydown", this.#onKey, true);
    window.addEventListener("pointerdown", this.#onPointer, true);
  }

  /** @param {PointerEvent} event @param {boolean} inside */
  #hover(event, inside) {
    clearTimeout(this.#hoverTimer);
    if (event.pointerType !== "mouse" || this.#mode === "pinned") return;
    this.#hoverTimer = setTimeout(() => (inside ? this.#open("hovered") : this.close()), HOVER_MS);
  }

  #place() {
    const bar = this.button.getBoundingClientRect();
    const width = this.panel.offsetWidth;
    const left = Math.max(8, Math.min(bar.right - width, window.innerWidth - width - 8));
    const below = bar.bottom + 6 + this.panel.offsetHeight <= window.innerHeight;
    const top = below ? bar.bottom + 6 : Math.max(8, bar.top - 6 - this.panel.offsetHeight);
    this.panel.style.left = `${left}px`;
    this.panel.style.top = `${top}px`;
  }

  /** Escape closes the panel and nothing else. @type {(event: KeyboardEvent) => void} */
  #onKey = (event) => {
    if (event.key !== "Escape") return;
    event.stopImmediatePropagation();
    event.preventDefault();
    const inside = this.panel.contains(document.activeElement);
    this.close();
    if (inside) this.button.focus();
  };

  /** @type {(event: PointerEvent) => void} */
  #onPointer = (event) => {
    const path = event.composedPath();
    if (!path.includes(this.panel) && !path.includes(this.button)) this.close();
  };
}

/** @param {Section} section */
function drawSection(section) {
  const title = h("p", { class: section.rows.length ? "vrh-title" : "vrh-note" }, ...dots(section.dot), section.title);
  if (section.rows.length === 0) return title;
  const rows = section.rows.map(({ label, value, dot }) => h("div", {}, h("dt", {}, ...dots(dot), label), h("dd", {}, value)));
  return h("section", {}, title, h("dl", {}, ...rows));
}

/** A coloured mark; the word stands in the text beside it. @param {Dot | undefined} dot */
function dots(dot) {
  return dot ? [h("i", { class: "vrh-dot", "data-dot": dot, "aria-hidden": "true" })] : [];
}
