// The front end as this pack uses it: the only file that imports ComfyUI's modules. What some version lacks is looked up, never assumed.

import * as apiModule from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const USE_NEW_MENU = "Comfy.UseNewMenu";

export { app };
export const api = apiModule.api;

/** @type {(extension: ComfyExtension) => void} */
export const registerExtension = (extension) => app.registerExtension(extension);

/** @param {AbortSignal} signal */
export function fetchStatus(signal) {
  return api.fetchApi("/v1/hardware/vram", { signal, cache: "no-store" });
}

/** @param {string} body @param {AbortSignal} signal */
export function fetchCheck(body, signal) {
  return post("/v1/hardware/vram/check", body, signal);
}

/** @param {string} body @param {AbortSignal} signal */
export function allowOnce(body, signal) {
  return post("/v1/hardware/vram/override", body, signal);
}

/** @param {string} path @param {string} body @param {AbortSignal} signal */
function post(path, body, signal) {
  return api.fetchApi(path, { method: "POST", headers: { "Content-Type": "application/json" }, body, signal });
}

/** @param {readonly string[]} types @param {() => void} listener */
export function onEvents(types, listener) {
  for (const type of types) api.addEventListener(type, listener);
}

/** @param {string} id @returns {unknown} */
export function setting(id) {
  return app.extensionManager.setting.get(id);
}

/** @param {{ severity: "info" | "warn", summary: string, detail: string }} toast */
export function toast(toast) {
  app.extensionManager.toast.add({ ...toast, life: 6000 });
}

/** Whether prompts may be queueing themselves: front ends before 1.58 do not say which ones do. */
export function autoQueueIsOn() {
  const mode = app.extensionManager.queueSettings?.mode ?? "disabled";
  return mode !== "disabled" || app.ui?.autoQueueEnabled === true;
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
    if (floating) floating.append(element);
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
