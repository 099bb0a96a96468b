// VRAM Headroom in the browser: the one extension that ComfyUI registers. The other files here do nothing by being imported.

import { Bar } from "./bar.js";
import * as comfy from "./comfy.js";
import { addStylesheet } from "./dom.js";
import { Preflight } from "./preflight.js";
import { question } from "./question.js";
import { keepWhatIsSaid } from "./said.js";
import { ASK, choices, settings, SHOW_BAR } from "./settings.js";
import { StatusClient } from "./status_client.js";

/** @import { Choices } from "./settings.js" */

/** Moments at which memory moves or is about to. */
const MEMORY_EVENTS = Object.freeze(["executing", "execution_start", "execution_success", "execution_error", "status", "reconnected"]);

/** @type {Bar | null} */
let bar = null;
let lastCheck = "";
let stopPlacing = () => {};
let isSetUp = false;

const client = new StatusClient(comfy.fetchStatus, (snapshot) => bar?.show(snapshot));

const preflight = new Preflight({
  api: comfy.api,
  app: comfy.app,
  check: comfy.fetchCheck,
  enforces: () => choices(comfy.setting)[ASK] === "enforce",
  allow: comfy.allowOnce,
  question,
  toast: comfy.toast,
  autoQueueIsOn: comfy.autoQueueIsOn,
  cancelled: comfy.cancelled,
  onChecked: (note) => {
    lastCheck = note;
    bar?.showCheck(note);
  },
});

function showBar() {
  if (bar) return;
  bar = new Bar();
  if (lastCheck) bar.showCheck(lastCheck);
  stopPlacing = comfy.placeInMenu(bar.element);
  bar.followTheme();
  client.start(document.hidden);
}

function hideBar() {
  client.stop();
  stopPlacing();
  bar?.remove();
  bar = null;
}

/** @param {Choices} chosen */
function apply(chosen) {
  if (chosen[SHOW_BAR]) showBar();
  else hideBar();
  if (chosen[ASK] === "off") preflight.remove();
  else preflight.install();
}

/** @param {string} changedId @param {unknown} value */
function settingChanged(changedId, value) {
  if (isSetUp) apply(choices((id) => (id === changedId ? value : comfy.setting(id))));
}

comfy.registerExtension({
  name: "VRAMHeadroom",
  settings: settings(settingChanged),
  beforeRegisterNodeDef: keepWhatIsSaid,
  init() {
    comfy.onEvents(MEMORY_EVENTS, () => client.refresh());
    comfy.onEvents(["reconnecting"], () => client.connectionLost());
    document.addEventListener("visibilitychange", () => client.setHidden(document.hidden));
  },
  setup() {
    addStylesheet("bar.css");
    addStylesheet("question.css");
    addStylesheet("said.css");
    isSetUp = true;
    apply(choices(comfy.setting));
  },
});
