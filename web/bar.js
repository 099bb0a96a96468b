// The bar in the top menu, and the details that open below it.

import { h, icon, isOnLight, setAttribute, setText } from "./dom.js";
import { detailsOf, readingOf } from "./reading.js";

/**
 * @import { IconName } from "./dom.js"
 * @import { Reading, Section } from "./reading.js"
 * @import { Snapshot } from "./status_client.js"
 */

export const BAR_ID = "vram-headroom-bar";
const DETAILS_ID = "vram-headroom-details";
const LEGEND = /** @type {const} */ ([
  ["in-use", "in use"],
  ["reclaimable", "can be given back"],
  ["others", "other programs"],
]);

export class Bar {
  element;
  #meter;
  #icon = h("span", { class: "vrh-icons" });
  #segments = LEGEND.map(([kind]) => h("i", { "data-kind": kind }));
  #headline = h("b", {});
  #amount = h("span", { class: "vrh-amount" });
  #live = h("span", { class: "vrh-spoken", role: "status", "aria-live": "polite" });
  #details = new Details();
  /** @type {Snapshot | null} */
  #snapshot = null;
  /** @type {IconName | null} */
  #iconName = null;
  #lastCheck = "";
  #updates = 0;
  #themeWatch = new MutationObserver(() => this.#followTheme());

  constructor() {
    this.#meter = h(
      "div",
      { class: "vrh-meter" },
      this.#icon,
      h("div", { class: "vrh-track" }, ...this.#segments),
      h("span", { class: "vrh-words" }, this.#headline, " ", this.#amount),
    );
    // A button would hide the meter's role from screen readers if it contained it, so it lies over it instead.
    this.element = h("div", { id: BAR_ID, class: "vrh-bar" }, this.#meter, this.#details.button, this.#live, this.#details.panel);
    this.#details.onOpen = () => this.#fillDetails();
    this.show({ state: "loading", status: null, reason: "" });
  }

  /** To be called once the bar stands in the page. */
  followTheme() {
    const watched = { attributes: true, attributeFilter: ["style", "class"] };
    for (const element of [document.documentElement, document.body]) this.#themeWatch.observe(element, watched);
    this.#followTheme();
  }

  /** @param {Snapshot} snapshot */
  show(snapshot) {
    this.#snapshot = snapshot;
    const reading = readingOf(snapshot);
    const before = this.element.dataset.level;
    if (this.#draw(reading)) {
      this.#followTheme();
      this.#updates += 1;
      this.element.dataset.updates = String(this.#updates);
    }
    const level = reading.level ?? "";
    if (!level) setText(this.#live, "");
    else if (before && before !== level) setText(this.#live, reading.spoken);
    if (this.#details.isOpen) this.#fillDetails();
  }

  /** @param {string} note how the last check before queueing went */
  showCheck(note) {
    this.#lastCheck = note;
    setAttribute(this.element, "data-last-check", note);
    if (this.#details.isOpen) this.#fillDetails();
  }

  remove() {
    this.#themeWatch.disconnect();
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
      "data-reason": this.#snapshot?.reason || null,
    };
    const changed = Object.entries(facts).some(([name, value]) => this.element.getAttribute(name) !== value);
    const moved = setMeter(this.#meter, reading);
    for (const [name, value] of Object.entries(facts)) setAttribute(this.element, name, value);
    this.#drawIcon(reading.level);
    setText(this.#headline, reading.headline);
    setText(this.#amount, reading.amount);
    const widths = [shares?.inUse ?? 0, shares?.reclaimable ?? 0, shares?.others ?? 0];
    this.#segments.forEach((segment, i) => {
      const width = `${widths[i]}%`;
      if (segment.style.width !== width) segment.style.width = width;
    });
    return changed || moved;
  }

  /** @param {Reading["level"]} level */
  #drawIcon(level) {
    const name = level === "critical" ? "triangle" : level === "high" ? "card_warning" : "card";
    if (this.#iconName === name) return;
    this.#iconName = name;
    this.#icon.replaceChildren(icon(name, "vrh-icon"));
  }

  #fillDetails() {
    if (!this.#snapshot) return;
    const sections = detailsOf(this.#snapshot);
    if (this.#lastCheck) sections.push({ title: `Last check before queueing: ${this.#lastCheck.replaceAll("_", " ")}`, rows: [] });
    this.#details.fill(sections);
  }

  #followTheme() {
    if (!this.element.isConnected) return;
    const theme = isOnLight(this.element) ? "light" : "dark";
    setAttribute(this.element, "data-theme", theme);
  }
}

/**
 * A meter needs a value: while there is none, the same element is a labelled image of its words.
 * @param {HTMLElement} meter
 * @param {Reading} reading
 * @returns {boolean} whether it changed
 */
function setMeter(meter, reading) {
  const { pressure, spoken } = reading;
  const known = pressure !== null;
  const facts = {
    role: known ? "meter" : "img",
    "aria-label": known ? "VRAM pressure" : spoken,
    "aria-valuemin": known ? "0" : null,
    "aria-valuemax": known ? "100" : null,
    "aria-valuenow": known ? String(pressure) : null,
    "aria-valuetext": known ? spoken : null,
  };
  const changed = Object.entries(facts).some(([name, value]) => meter.getAttribute(name) !== value);
  for (const [name, value] of Object.entries(facts)) setAttribute(meter, name, value);
  return changed;
}

/** The panel below the bar: the button toggles it; resting the pointer on the bar shows it for as long. */
class Details {
  button;
  panel;
  onOpen = () => {};
  #drawn = "";
  /** @type {"closed" | "hovered" | "pinned"} */
  #mode = "closed";
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  #hoverTimer;

  constructor() {
    this.button = h("button", {
      type: "button",
      class: "vrh-button",
      "aria-label": "VRAM details",
      "aria-expanded": "false",
      "aria-controls": DETAILS_ID,
    });
    this.panel = h("div", {
      id: DETAILS_ID,
      class: "vrh-details",
      popover: "manual",
      role: "group",
      "aria-label": "VRAM details",
      tabindex: "0",
    });
    this.button.addEventListener("click", () => (this.#mode === "pinned" ? this.close() : this.#open("pinned")));
    for (const element of [this.button, this.panel]) {
      element.onpointerenter = (event) => this.#hover(event, true);
      element.onpointerleave = (event) => this.#hover(event, false);
    }
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

  /** @param {Section[]} sections */
  fill(sections) {
    const drawn = JSON.stringify(sections);
    if (drawn === this.#drawn) return;
    this.#drawn = drawn;
    const legend = LEGEND.map(([kind, words]) => h("span", {}, h("i", { "data-kind": kind }), words));
    this.panel.replaceChildren(...sections.map(drawSection), h("p", { class: "vrh-legend" }, ...legend));
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
    this.#hoverTimer = setTimeout(() => (inside ? this.#open("hovered") : this.close()), 250);
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
  const title = h("p", { class: section.rows.length ? "vrh-title" : "vrh-note" }, section.title);
  if (section.rows.length === 0) return title;
  const rows = section.rows.map(({ label, value }) => h("div", {}, h("dt", {}, label), h("dd", {}, value)));
  return h("section", {}, title, h("dl", {}, ...rows));
}
