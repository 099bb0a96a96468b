// VRAM Headroom in the browser: the one extension that ComfyUI registers. The other files here do nothing by being imported.

import { Accidents } from "./accidents.js";
import { Badge } from "./badge.js";
import { Bar } from "./bar.js";
import { CanvasBadges } from "./canvas_badges.js";
import * as comfy from "./comfy.js";
import { commands, menu } from "./commands.js";
import { Dialogs } from "./dialogs.js";
import { addStylesheet } from "./dom.js";
import { offloadEncoders } from "./encoders.js";
import { isObject, text } from "./fields.js";
import { Preflight } from "./preflight.js";
import { Remembered } from "./remembered.js";
import { Runs } from "./run.js";
import { keepWhatIsSaid } from "./said.js";
import { CARD, choices, settings } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { StatusClient } from "./status_client.js";
import { t, translate } from "./strings.js";
import { deviceWords, size, wholePercent } from "./text.js";
import { Watch } from "./watch.js";

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

/** Who wants readings. @type {Set<"bar" | "panel">} */
const readers = new Set();

const client = new StatusClient(comfy.fetchStatus, (snapshot) => {
  bar?.show(snapshot);
  sidebar.show(snapshot);
  nodeBadges.showStatus(snapshot.status);
});
const runs = new Runs();
const watch = new Watch(comfy.postWatch, (status, run) => {
  client.receive(status);
  if (runs.report(run)) runChanged();
});
const sidebar = new Sidebar({
  post: comfy.postAction,
  outcome: comfy.fetchOutcome,
  opened: (open) => {
    read("panel", open);
    watch.want("panel", open);
  },
  moved: () => client.refresh(),
  hasVoice: () => bar !== null,
  say: (told) => bar?.say(told),
});
const badge = new Badge();
const nodeBadges = new CanvasBadges({
  app: comfy.app,
  badgeClass: comfy.nodeBadgeClass,
  follow: (state) => comfy.followed("Nodes", state),
  check: comfy.fetchCheck,
  watch: (wanted) => watch.want("badges", wanted),
});
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
  onPosted: (posted) => {
    void ranOut(accidents.note(posted));
    nodeBadges.posted(posted);
  },
  onChecked: (note) => {
    lastCheck = note;
    bar?.showCheck(note);
  },
});

/** @param {"bar" | "panel"} reader @param {boolean} reads */
function read(reader, reads) {
  if (reads) readers.add(reader);
  else readers.delete(reader);
  if (readers.size) client.start(document.hidden);
  else client.stop();
}

function runChanged() {
  sidebar.showRun(runs.run);
  nodeBadges.showRun(runs.run);
}

function showBar() {
  if (bar) return;
  bar = new Bar();
  bar.onCard = (card) => void comfy.setSetting(CARD, card);
  bar.onCritical = warn;
  bar.onReading = (reading) => badge.show(reading);
  if (lastCheck) bar.showCheck(lastCheck);
  stopPlacing = comfy.placeInMenu(bar.element);
  bar.followTheme();
  if (readers.size) bar.show(client.snapshot);
  read("bar", true);
}

function hideBar() {
  read("bar", false);
  stopPlacing();
  bar?.remove();
  bar = null;
  badge.show(null);
}

/** @param {Device} device */
function warn(device) {
  const facts = { card: deviceWords(device), pressure: wholePercent(device.pressure), left: size(device.reclaimableFree) };
  comfy.toast({ severity: "warn", summary: t("toast_critical"), detail: t("toast_critical_detail", facts) });
}

/** @param {Choices} chosen */
function follow(chosen) {
  client.pollSeconds = sidebar.pollSeconds = chosen.pollSeconds;
  sidebar.criticalAt = chosen.warnAt;
  if (chosen.showBar) showBar();
  else hideBar();
  bar?.choose({ shows: chosen.barShows, card: chosen.card, pollSeconds: chosen.pollSeconds, criticalAt: chosen.warnAt });
  nodeBadges.switch(chosen.nodeBadges);
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
    comfy.toast({ severity: "warn", summary: t("ran_out", { node: accident.node }), detail: accident.posted.answer?.message ?? accident.message });
    return;
  }
  try {
    await dialogs.afterRunningOut(accident, await preflight.ask(accident.posted.output));
  } catch {
    // without a check there is nothing to add to what ComfyUI shows itself
  }
}

/** @type {readonly [string, (detail: unknown) => boolean][]} */
const RUN_EVENTS = Object.freeze([
  ["vram_headroom.plan", (detail) => runs.plan(detail)],
  ["vram_headroom.phase", (detail) => runs.phase(detail)],
  ["vram_headroom.recovery", (detail) => runs.recovery(detail)],
  ["progress", (detail) => runs.progress(detail)],
]);

const COMMANDS = commands({
  checkGraph: async () => {
    try {
      const { output } = await comfy.app.graphToPrompt();
      await dialogs.asked(await preflight.ask(output), output);
    } catch (error) {
      comfy.toast({ severity: "error", summary: t("toast_not_checked"), detail: error instanceof Error ? error.message : String(error) });
    }
  },
  offloadEncoders: async () => {
    try {
      comfy.toast(await offloadEncoders({ status: comfy.fetchStatus, post: comfy.postAction }));
      client.refresh();
    } catch (error) {
      failed(error);
    }
  },
  freeAll: () => told(comfy.freeAll(), t("toast_unloads"), t("toast_unloads_detail")),
});

/** @param {Promise<Response>} request @param {string} summary @param {string} detail */
async function told(request, summary, detail) {
  try {
    const response = await request;
    if (!response.ok) throw new Error(t("server_answered", { status: response.status }));
    comfy.toast({ severity: "success", summary, detail });
    client.refresh();
  } catch (error) {
    failed(error);
  }
}

/** @param {unknown} error */
function failed(error) {
  comfy.toast({ severity: "error", summary: t("toast_failed"), detail: error instanceof Error ? error.message : String(error) });
}

function followSight() {
  for (const part of [client, watch, sidebar, nodeBadges]) part.setHidden(document.hidden);
}

/** @param {unknown} detail of an event */
function promptOf(detail) {
  return isObject(detail) ? text(detail.prompt_id, "") : "";
}

comfy.registerExtension({
  name: "VRAMHeadroom",
  settings: settings(settingChanged),
  beforeRegisterNodeDef: keepWhatIsSaid,
  commands: COMMANDS,
  menuCommands: menu(COMMANDS),
  get aboutPageBadges() {
    return [{ label: t("about_badge"), url: comfy.api.apiURL("/v1/hardware/vram"), icon: "pi pi-microchip" }];
  },
  get topbarBadges() {
    return badge.badges;
  },
  nodeCreated: (node) => nodeBadges.created(node),
  afterConfigureGraph: () => nodeBadges.madeAnew(),
  init() {
    comfy.onEvents(MEMORY_EVENTS, () => client.refresh());
    comfy.onEvents(["reconnecting"], () => client.connectionLost());
    comfy.onEvents(["reconnected"], () => watch.reconnected());
    comfy.onEvent("execution_error", (detail) => void ranOut(accidents.from(detail)));
    comfy.onEvents(["graphChanged"], () => nodeBadges.changed());
    comfy.onEvent("execution_start", (detail) => nodeBadges.started(promptOf(detail)));
    comfy.onEvents(["execution_success", "execution_error", "execution_interrupted"], () => nodeBadges.ended(true));
    comfy.onEvent("vram_headroom.status", (detail) => client.receive(detail));
    for (const [type, take] of RUN_EVENTS) comfy.onEvent(type, (detail) => take(detail) && runChanged());
    document.addEventListener("visibilitychange", followSight);
  },
  setup() {
    addStylesheet("bar.css");
    addStylesheet("question.css");
    addStylesheet("said.css");
    addStylesheet("panel.css");
    badge.connect();
    followSight();
    comfy.registerSidebarTab(sidebar.tab);
    void comfy.fetchTranslation().then(translate, () => {});
    isSetUp = true;
    follow(choices(comfy.setting));
  },
});
