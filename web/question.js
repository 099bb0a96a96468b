// The question before a prompt that does not fit is queued: Cancel or Run anyway.

import { h, icon, isOnLight } from "./dom.js";
import { neededWords, roleWord, shapeWords, size, sizeOrUnknown } from "./text.js";

/**
 * @import { Answer, Model, Phase } from "./answers.js"
 * @import { Decision } from "./preflight.js"
 */

export const QUESTION_ID = "vram-headroom-question";
const TITLE_ID = `${QUESTION_ID}-title`;
const MESSAGE_ID = `${QUESTION_ID}-message`;

/** @type {Promise<unknown>} */
let before = Promise.resolve();

/**
 * Opens the question, after any that is still open.
 * @param {Answer} answer
 * @returns {Promise<Decision>}
 */
export function question(answer) {
  const decision = before.then(() => open(answer));
  before = decision.catch(() => undefined);
  return decision;
}

/** @param {Answer} answer @returns {Promise<Decision>} */
function open(answer) {
  const cancel = h("button", { type: "button", "data-decision": "cancel", autofocus: "" }, "Cancel");
  const run = h("button", { type: "button", "data-decision": "run" }, "Run anyway");
  const dialog = h(
    "dialog",
    { id: QUESTION_ID, class: "vrh-question", "aria-labelledby": TITLE_ID, "aria-describedby": MESSAGE_ID },
    h(
      "div",
      { class: "vrh-question-head" },
      icon("triangle", "vrh-question-icon"),
      h(
        "div",
        {},
        h("h1", { id: TITLE_ID }, titleOf(answer)),
        h("p", { id: MESSAGE_ID }, answer.message),
      ),
    ),
    h("div", { class: "vrh-question-body" }, ...phases(answer), ...models(answer.models), ...assumptions(answer.assumptions)),
    h("div", { class: "vrh-question-foot" }, cancel, run),
  );
  document.body.append(dialog);
  return new Promise((resolve, reject) => {
    const giveBackTheKeys = keepEventsInside(dialog);
    cancel.addEventListener("click", () => dialog.close("cancel"));
    run.addEventListener("click", () => dialog.close("run"));
    dialog.addEventListener("close", () => {
      giveBackTheKeys();
      dialog.remove();
      resolve(dialog.returnValue === "run" ? "run" : "cancel");
    });
    try {
      dialog.showModal();
      dialog.dataset.theme = isOnLight(dialog) ? "light" : "dark";
      cancel.focus();
    } catch (error) {
      giveBackTheKeys();
      dialog.remove();
      reject(error);
    }
  });
}

/**
 * ComfyUI listens to the whole window: behind the dialog Ctrl+Enter would queue again and Ctrl+V paste nodes,
 * and older front ends take Escape for themselves. Keys released are let through: the front end counts Shift by them.
 * @param {HTMLDialogElement} dialog
 * @returns {() => void} ends it
 */
function keepEventsInside(dialog) {
  const kept = /** @type {const} */ (["keydown", "keypress", "copy", "cut", "paste"]);
  /** @param {Event} event */
  const keep = (event) => {
    event.stopImmediatePropagation();
    if (event instanceof KeyboardEvent && event.type === "keydown" && event.key === "Escape") {
      event.preventDefault();
      dialog.close("cancel");
    }
  };
  for (const type of kept) window.addEventListener(type, keep, true);
  return () => {
    for (const type of kept) window.removeEventListener(type, keep, true);
  };
}

/** @param {Answer} answer */
function titleOf(answer) {
  const index = offender(answer);
  const phase = index === null ? undefined : answer.phases[index];
  return phase ? `${phase.title} does not fit this card` : "This graph does not fit this card";
}

/** @param {Answer} answer @returns {number | null} the phase the sentence is about */
function offender(answer) {
  if (answer.peakPhase !== null) return answer.peakPhase;
  const shortest = Math.max(0, ...answer.phases.map((p) => p.short));
  return shortest > 0 ? answer.phases.findIndex((p) => p.short === shortest) : null;
}

/** @param {Answer} answer @returns {HTMLElement[]} */
function phases(answer) {
  if (answer.phases.length === 0) return [];
  const marked = offender(answer);
  const head = ["Phase", "Needs", "Can be free", "Outcome"].map((words) => h("th", { scope: "col" }, words));
  return [
    h(
      "table",
      { class: "vrh-phases" },
      h("caption", {}, "Phases of the run"),
      h("thead", {}, h("tr", {}, ...head)),
      h("tbody", {}, ...answer.phases.map((p, i) => phaseRow(p, i === marked))),
    ),
  ];
}

/** @param {Phase} phase @param {boolean} marked */
function phaseRow(phase, marked) {
  const shape = shapeWords(phase);
  const short = phase.short > 0 || marked;
  const known = phase.needed !== null && phase.available !== null;
  const outcome = phase.short > 0 ? `short by ${size(phase.short)}` : marked ? "does not fit" : known ? "fits" : "not known";
  return h(
    "tr",
    { "data-short": String(short), ...(marked ? { "data-offender": "true" } : {}) },
    h("th", { scope: "row" }, phase.title, ...(shape ? [h("small", {}, shape)] : [])),
    h("td", {}, neededWords(phase.needed)),
    h("td", {}, sizeOrUnknown(phase.available)),
    h("td", {}, ...(short ? [icon("triangle", "vrh-row-icon"), outcome] : [outcome])),
  );
}

/** @param {Model[]} list @returns {HTMLElement[]} */
function models(list) {
  if (list.length === 0) return [];
  const rows = list.map((m) =>
    h("tr", {}, h("th", { scope: "row" }, m.file), h("td", {}, roleWord(m.role)), h("td", {}, sizeOrUnknown(m.bytes))),
  );
  const head = ["File", "Role", "Size"].map((words) => h("th", { scope: "col" }, words));
  return [
    h(
      "table",
      { class: "vrh-models" },
      h("caption", {}, "Models"),
      h("thead", {}, h("tr", {}, ...head)),
      h("tbody", {}, ...rows),
    ),
  ];
}

/** @param {string[]} list @returns {HTMLElement[]} */
function assumptions(list) {
  if (list.length === 0) return [];
  const items = list.map((assumption) => h("li", {}, assumption));
  return [h("details", { class: "vrh-assumptions" }, h("summary", {}, `Assumptions (${list.length})`), h("ul", {}, ...items))];
}
