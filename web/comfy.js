// The front end as this pack uses it: the only file that imports ComfyUI's modules. What some version lacks is looked up, never assumed.

import * as apiModule from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const USE_NEW_MENU = "Comfy.UseNewMenu";
const TOAST_MS = 6000;

export { app };
export const api = apiModule.api;

/** @type {(extension: ComfyExtension) => void} */
export const registerExtension = (extension) => app.registerExtension(extension);

/** @param {AbortSignal} [signal] */
export function fetchStatus(signal) {
  return api.fetchApi("/v1/hardware/vram", { ...(signal ? { signal } : {}), cache: "no-store" });
}

/** @param {string} body @param {AbortSignal} signal */
export function fetchCheck(body, signal) {
  return post("/v1/hardware/vram/check", body, signal);
}

/** @param {string} body @param {AbortSignal} signal */
export function allowOnce(body, signal) {
  return post("/v1/hardware/vram/override", body, signal);
}

/** The class of the front end's own node badges, where it has them. */
export const nodeBadgeClass = () => window.LGraphBadge;

/** Says that this page watches, or no longer does. @param {boolean} watching */
export function postWatch(watching) {
  return post("/v1/hardware/vram/watch", JSON.stringify({ client_id: api.clientId ?? "", watching }));
}

/** @param {"offload" | "pin" | "unpin" | "free"} action @param {number | null} key of the model; null: all of them */
export function postAction(action, key) {
  return post(`/v1/hardware/vram/${action}`, JSON.stringify(key === null ? {} : { key }));
}

/** What became of an action that had to wait. @param {string} id */
export function fetchOutcome(id) {
  return api.fetchApi(`/v1/hardware/vram/actions/${encodeURIComponent(id)}`, { cache: "no-store" });
}

/** The pack's sentences in the person's language, where its locales folder has them. @returns {Promise<unknown>} */
export async function fetchTranslation() {
  const language = String(setting("Comfy.Locale") ?? "en");
  if (language === "en") return null;
  const response = await api.fetchApi("/i18n");
  return response.ok ? (await response.json())?.[language]?.vramHeadroom : null;
}

/** ComfyUI's own way to unload all models: done between prompts. */
export function freeAll() {
  return post("/free", JSON.stringify({ unload_models: true, free_memory: true }));
}

/** @param {string} path @param {string} body @param {AbortSignal} [signal] */
function post(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  return api.fetchApi(path, { method: "POST", headers, body, ...(signal ? { signal } : {}) });
}

/** @param {readonly string[]} types @param {() => void} listener */
export function onEvents(types, listener) {
  for (const type of types) api.addEventListener(type, listener);
}

/** @param {string} type @param {(detail: unknown) => void} listener */
export function onEvent(type, listener) {
  api.addEventListener(type, (event) => listener(event?.detail));
}

/** Front ends without a sidebar go without the panel. @param {ComfySidebarTab} tab */
export function registerSidebarTab(tab) {
  app.extensionManager.registerSidebarTab?.(tab);
}

/** @param {string} id @returns {unknown} */
export function setting(id) {
  return app.extensionManager.setting.get(id);
}

/** @param {string} id @param {unknown} value */
export function setSetting(id, value) {
  return app.extensionManager.setting.set(id, value);
}

/** @param {{ severity: "info" | "warn" | "success" | "error", summary: string, detail: string }} toast */
export function toast(toast) {
  app.extensionManager.toast.add({ ...toast, life: TOAST_MS });
}

/** Whether prompts may be queueing themselves: front ends before 1.58 do not say which ones do. */
export function autoQueueIsOn() {
  const mode = app.extensionManager.queueSettings?.mode ?? "disabled";
  return mode !== "disabled" || app.ui?.autoQueueEnabled === true;
}

/** Whether the canvas and its menu have made way for App Mode, which front ends have since 1.41. */
export function isInAppMode() {
  const workflow = app.extensionManager.workflow?.activeWorkflow;
  const mode = workflow?.activeMode ?? workflow?.initialMode;
  return mode === "app" || mode === "builder:arrange";
}

/**
 * An object that the front end's own parts follow: what reads it while they draw is read anew when it changes.
 * @template {object} State
 * @param {string} name a different one for each
 * @param {State} state
 * @returns {State}
 */
export function followed(name, state) {
  // a property of a reactive store comes back as a reactive object; undocumented, so a plain one must do as well
  try {
    const manager = /** @type {Record<string, any>} */ (app.extensionManager);
    const property = `__vramHeadroom${name}`;
    manager[property] = state;
    return manager[property] ?? state;
  } catch {
    return state;
  }
}

/**
 * What api.queuePrompt does for a prompt that was cancelled, so that nothing is shown for it. Where errors have a tab of their own, an
 * execution error that names no node is silent and ends the batch; elsewhere any error opens a dialog, and an answer without an id is silent.
 */
export function cancelled() {
  const PromptExecutionError = apiModule.PromptExecutionError ?? window.comfyAPI?.api?.PromptExecutionError;
  if (PromptExecutionError && setting("Comfy.RightSidePanel.ShowErrorsTab") === true) {
    throw new PromptExecutionError({ node_errors: {} }, 400);
  }
  return { node_errors: {} };
}

/**
 * Puts an element left of Run, and keeps it in sight when the person switches between the top menu and the floating one of old.
 * @param {HTMLElement} element
 * @returns {() => void} ends it; the element itself stays where it is
 */
export function placeInMenu(element) {
  /** @param {unknown} menu the value of the setting */
  const place = (menu) => {
    const floating = menu === "Disabled" ? app.ui?.menuContainer : undefined;
    const queueButton = floating?.querySelector("#queue-button");
    if (queueButton) queueButton.after(element);
    else if (floating) floating.append(element);
    // Not asked whether it is connected: the menu is mounted later than extensions are set up.
    else app.menu?.settingsGroup.element.before(element);
  };
  /** @param {Event} event carries the new value, which front ends before 1.58 store only later */
  const changed = (event) => place(event instanceof CustomEvent ? event.detail?.value : setting(USE_NEW_MENU));
  place(setting(USE_NEW_MENU));
  const settings = app.ui?.settings;
  settings?.addEventListener?.(`${USE_NEW_MENU}.change`, changed);
  return () => settings?.removeEventListener?.(`${USE_NEW_MENU}.change`, changed);
}
