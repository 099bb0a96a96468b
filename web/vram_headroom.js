// VRAM Headroom in the browser: the one extension that ComfyUI registers. The other files here do nothing by being imported.

import { Accidents } from "./accidents.js";
import { Badge } from "./badge.js";
import { Bar } from "./bar.js";
import * as comfy from "./comfy.js";
import { commands, menu } from "./commands.js";
import { Dialogs } from "./dialogs.js";
import { addStylesheet } from "./dom.js";
import { Preflight } from "./preflight.js";
import { Remembered } from "./remembered.js";
import { keepWhatIsSaid } from "./said.js";
import { CARD, choices, settings } from "./settings.js";
import { StatusClient } from "./status_client.js";
import { deviceWords, size, wholePercent } from "./text.js";

/**
 * @import { Accident } from "./accidents.js"
 * @import { Choices } from "./settings.js"
 * @import { Device } from "./status.js"
 */

/** Moments at which memory moves or is about to. */
const MEMORY_EVENTS = Object.freeze(["executing", "execution_start", "execution_success", "execution_error", "status", "reconnected"]);

/** @type {Bar | null} */
let bar = null;
let lastCheck = "";
let stopPlacing = () => {};
let isSetUp = false;

const client = new StatusClient(comfy.fetchStatus, (snapshot) => bar?.show(snapshot));
const badge = new Badge();
const accidents = new Accidents();
const remembered = new Remembered(localStorage);
const dialogs = new Dialogs(remembered, () => ({ ...choices(comfy.setting) }));

const preflight = new Preflight({
  api: comfy.api,
  app: comfy.app,
  check: comfy.fetchCheck,
  enforces: () => choices(comfy.setting).ask === "enforce",
  allow: comfy.allowOnce,
  question: (answer, prompt, refused) => dialogs.beforeQueueing(answer, prompt, refused),
  toast: comfy.toast,
  autoQueueIsOn: comfy.autoQueueIsOn,
  cancelled: comfy.cancelled,
  remembered,
  onPosted: (posted) => void ranOut(accidents.note(posted)),
  onChecked: (note) => {
    lastCheck = note;
    bar?.showCheck(note);
  },
});

function showBar() {
  if (bar) return;
  bar = new Bar();
  bar.onCard = (card) => void comfy.setSetting(CARD, card);
  bar.onCritical = warn;
  bar.onReading = (reading) => badge.show(reading);
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
  badge.show(null);
}

/** @param {Device} device */
function warn(device) {
  const detail = `${deviceWords(device)}: ${wholePercent(device.pressure)} % cannot be given back, ${size(device.reclaimableFree)} are left.`;
  comfy.toast({ severity: "warn", summary: "VRAM is nearly full", detail });
}

/** @param {Choices} chosen */
function follow(chosen) {
  client.pollSeconds = chosen.pollSeconds;
  if (chosen.showBar) showBar();
  else hideBar();
  bar?.choose({ shows: chosen.barShows, card: chosen.card, pollSeconds: chosen.pollSeconds, criticalAt: chosen.warnAt });
  if (chosen.ask === "off") preflight.remove();
  else preflight.install();
}

/** @param {string} changedId @param {unknown} value */
function settingChanged(changedId, value) {
  if (isSetUp) follow(choices((id) => (id === changedId ? value : comfy.setting(id))));
}

/** @param {Accident | null} accident */
async function ranOut(accident) {
  if (!accident || choices(comfy.setting).ask === "off") return;
  if (accident.posted.auto) {
    comfy.toast({ severity: "warn", summary: `${accident.node} ran out of memory`, detail: accident.posted.answer?.message ?? accident.message });
    return;
  }
  try {
    await dialogs.afterRunningOut(accident, await preflight.ask(accident.posted.output));
  } catch {
    // without a check there is nothing to add to what ComfyUI shows itself
  }
}

const COMMANDS = commands({
  checkGraph: async () => {
    try {
      const { output } = await comfy.app.graphToPrompt();
      await dialogs.asked(await preflight.ask(output), output);
    } catch (error) {
      comfy.toast({ severity: "error", summary: "The graph could not be checked", detail: error instanceof Error ? error.message : String(error) });
    }
  },
  freeAll: () => told(comfy.freeAll(), "ComfyUI unloads all models", "Now, or as soon as the prompt that runs has ended."),
});

/** @param {Promise<Response>} request @param {string} summary @param {string} detail */
async function told(request, summary, detail) {
  try {
    const response = await request;
    if (!response.ok) throw new Error(`the server answered ${response.status}`);
    comfy.toast({ severity: "success", summary, detail });
    client.refresh();
  } catch (error) {
    comfy.toast({ severity: "error", summary: "That did not work", detail: error instanceof Error ? error.message : String(error) });
  }
}

comfy.registerExtension({
  name: "VRAMHeadroom",
  settings: settings(settingChanged),
  beforeRegisterNodeDef: keepWhatIsSaid,
  commands: COMMANDS,
  menuCommands: menu(COMMANDS),
  aboutPageBadges: [{ label: "VRAM Headroom: what it sees now", url: comfy.api.apiURL("/v1/hardware/vram"), icon: "pi pi-microchip" }],
  get topbarBadges() {
    return badge.badges;
  },
  init() {
    comfy.onEvents(MEMORY_EVENTS, () => client.refresh());
    comfy.onEvents(["reconnecting"], () => client.connectionLost());
    comfy.onExecutionError((detail) => void ranOut(accidents.from(detail)));
    document.addEventListener("visibilitychange", () => client.setHidden(document.hidden));
  },
  setup() {
    addStylesheet("bar.css");
    addStylesheet("question.css");
    addStylesheet("said.css");
    badge.connect();
    isSetUp = true;
    follow(choices(comfy.setting));
  },
});
