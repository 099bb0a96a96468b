// The panel's place in ComfyUI's sidebar: there while it is open, drawn at most twice a second, and only while somebody can see it.

import { Actions } from "./actions.js";
import { Pace } from "./pace.js";
import { Panel } from "./panel.js";
import { CRITICAL_AT } from "./levels.js";
import { POLL_SECONDS } from "./status_client.js";
import { t } from "./strings.js";

/**
 * @import { Ports } from "./actions.js"
 * @import { Run } from "./run.js"
 * @import { Snapshot } from "./status_client.js"
 *
 * @typedef {object} Outside
 * @property {Ports["post"]} post
 * @property {Ports["outcome"]} outcome
 * @property {(open: boolean) => void} opened or closed
 * @property {() => void} moved memory has been moved on demand
 * @property {() => boolean} hasVoice whether somebody says things to the ear already
 * @property {(text: string) => void} say
 */

export const TAB_ID = "vram-headroom";

export class Sidebar {
  criticalAt = CRITICAL_AT;
  pollSeconds = POLL_SECONDS;
  #outside;
  #actions;
  /** @type {Panel | null} */
  #panel = null;
  #pace = new Pace(() => this.#draw());
  /** @type {Snapshot} */
  #snapshot = { state: "loading", status: null, reason: "" };
  /** @type {Run | null} */
  #run = null;
  #told = "";
  #hasVoice = false;

  /** @param {Outside} outside */
  constructor(outside) {
    this.#outside = outside;
    this.#actions = new Actions({
      post: outside.post,
      outcome: outside.outcome,
      tell: (told) => {
        this.#told = told;
        this.#hasVoice = outside.hasVoice();
        outside.say(told);
        outside.moved();
        this.#pace.request();
      },
      changed: () => this.#pace.request(),
    });
  }

  /** @returns {ComfySidebarTab} */
  get tab() {
    return {
      id: TAB_ID,
      icon: "pi pi-microchip",
      title: t("panel_title"),
      tooltip: t("panel_tooltip"),
      type: "custom",
      render: (element) => this.#open(element),
      destroy: () => this.#close(),
    };
  }

  /** @param {Snapshot} snapshot */
  show(snapshot) {
    this.#snapshot = snapshot;
    if (snapshot.status) this.#actions.follow(snapshot.status);
    if (this.#panel) this.#pace.request();
  }

  /** @param {Run | null} run */
  showRun(run) {
    this.#run = run;
    if (this.#panel) this.#pace.request();
  }

  /** @param {boolean} hidden */
  setHidden(hidden) {
    this.#pace.setHidden(hidden);
  }

  /** @param {HTMLElement} element */
  #open(element) {
    this.#close();
    this.#panel = new Panel((action, key, name) => void this.#actions.ask(action, key, name));
    this.#hasVoice = this.#outside.hasVoice();
    this.#draw();
    this.#panel.mount(element);
    this.#outside.opened(true);
  }

  #close() {
    if (!this.#panel) return;
    this.#panel.remove();
    this.#panel = null;
    this.#told = "";
    this.#pace.stop();
    this.#outside.opened(false);
  }

  #draw() {
    this.#panel?.show({
      snapshot: this.#snapshot,
      run: this.#run,
      pending: this.#actions.pending,
      told: this.#told,
      hasVoice: this.#hasVoice,
      criticalAt: this.criticalAt,
      pollSeconds: this.pollSeconds,
    });
  }
}
