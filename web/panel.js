// The panel in the sidebar: what the card holds, the run, the models, the machine. Made anew each time it is opened.

import { AboutView } from "./about_view.js";
import { cardStack, drawStack, memoryStack } from "./card_view.js";
import { chartOf } from "./chart.js";
import { followTheme, h, markTheme, setAttribute, setHidden, setText } from "./dom.js";
import { inventoryOf } from "./inventory.js";
import { ModelList } from "./model_list.js";
import { RunView } from "./run_view.js";
import { t } from "./strings.js";

/**
 * @import { Pending } from "./inventory.js"
 * @import { Ask } from "./model_list.js"
 * @import { Run } from "./run.js"
 * @import { Snapshot } from "./status_client.js"
 *
 * @typedef {object} Shown everything the panel draws from
 * @property {Snapshot} snapshot
 * @property {Run | null} run
 * @property {readonly Pending[]} pending
 * @property {string} told what became of the last action
 * @property {boolean} hasVoice whether somebody else says it to the ear
 * @property {number} criticalAt percent
 * @property {number} pollSeconds
 */

export const PANEL_ID = "vram-headroom-panel";

export class Panel {
  element;
  #note = h("p", { class: "vrh-panel-note" });
  #told = h("p", { class: "vrh-told" });
  #cards = h("div", {});
  #runView = new RunView();
  #models;
  #about = new AboutView();
  #drawnCards = "";
  /** @type {Run | null | undefined} */
  #run = undefined;
  #stopTheme = () => {};

  /** @param {Ask} ask */
  constructor(ask) {
    this.#models = new ModelList(ask);
    this.element = h(
      "div",
      { id: PANEL_ID, class: "vrh-panel", role: "region", "aria-label": t("panel_name"), tabindex: "0" },
      this.#note,
      this.#cards,
      this.#runView.element,
      this.#models.element,
      this.#told,
      this.#about.element,
    );
  }

  /** @param {HTMLElement} parent */
  mount(parent) {
    parent.replaceChildren(this.element);
    this.#stopTheme = followTheme(this.element);
    // the sidebar may put what it has rendered into the page only afterwards
    requestAnimationFrame(() => markTheme(this.element));
  }

  /** @param {Shown} shown */
  show({ snapshot, run, pending, told, hasVoice, criticalAt, pollSeconds }) {
    const { state, status, reason } = snapshot;
    setAttribute(this.element, "data-state", state);
    const failed = state === "error" || state === "disconnected";
    const lost = failed ? [t("no_reading", { reason, seconds: pollSeconds }), status ? t("old_figures") : ""].filter(Boolean).join(" ") : "";
    setText(this.#note, state === "loading" ? t("waiting_for_reading") : state === "no_gpu" ? t("no_gpu") : lost);
    setHidden(this.#note, this.#note.textContent === "");
    setAttribute(this.#told, "role", hasVoice ? null : "status");
    setText(this.#told, told);
    setHidden(this.#told, told === "" && hasVoice);
    if (run !== this.#run) {
      this.#run = run;
      this.#runView.show(run && chartOf(run), run?.state === "running");
    }
    for (const part of [this.#models, this.#about]) setHidden(part.element, status === null);
    setHidden(this.#runView.element, state === "no_gpu" && run === null);
    if (status === null) return;
    const stacks = status.devices.map((device) => cardStack(status, device, criticalAt));
    if (status.ram) stacks.push(memoryStack(status.ram));
    const drawn = JSON.stringify(stacks);
    if (drawn !== this.#drawnCards) {
      this.#drawnCards = drawn;
      this.#cards.replaceChildren(...stacks.map(drawStack));
    }
    this.#models.show(inventoryOf(status, pending));
    this.#about.show(status);
  }

  remove() {
    this.#stopTheme();
    this.element.remove();
  }
}
