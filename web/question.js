// The dialog about a prompt that does not fit, before it is queued or after it ran out of memory: what is wrong, and what would help.

import { h, icon, isOnLight, setText } from "./dom.js";
import { fixChooser } from "./fixes.js";
import { t } from "./strings.js";
import { offender, stretches, timeline } from "./timeline.js";
import { neededWords, roleWord, shapeWords, size, sizeOrUnknown } from "./text.js";

/**
 * @import { Answer, Fix, Model } from "./answers.js"
 * @import { Stretch } from "./timeline.js"
 *
 * @typedef {object} Ask
 * @property {Answer} answer
 * @property {string} heading
 * @property {string[]} told sentences below it
 * @property {boolean} [failed] it has gone wrong already, whatever the check says now
 * @property {string} cancel label of the button that changes nothing
 * @property {string} [run] label of the button that runs it as it is; none without
 * @property {string} [apply] label of the button that makes a fix first
 * @property {(fix: Fix) => Promise<void>} [make] makes it on the canvas; what it throws is shown, and the dialog stays
 * @property {boolean} [remembered] whether this graph is not to be asked about; without, that is no choice here
 * @property {() => Promise<boolean>} [copy] puts a report into the clipboard; false where the browser refuses
 *
 * @typedef {{ choice: "run" | "cancel" | "apply", remember: boolean }} Decision
 */

export const QUESTION_ID = "vram-headroom-question";
const TITLE_ID = `${QUESTION_ID}-title`;
const MESSAGE_ID = `${QUESTION_ID}-message`;

/** @type {Promise<unknown>} */
let before = Promise.resolve();

/**
 * Opens the question, after any that is still open.
 * @param {Ask} ask
 * @returns {Promise<Decision>}
 */
export function question(ask) {
  const decision = before.then(() => open(ask));
  before = decision.catch(() => undefined);
  return decision;
}

/** @param {Answer} answer */
export function headingOf(answer) {
  const index = answer.verdict === "does_not_fit" ? offender(answer) : null;
  const phase = index === null ? undefined : answer.phases[index];
  if (phase) return t("heading_phase", { phase: phase.title });
  if (answer.verdict === "does_not_fit") return t("heading_graph");
  if (answer.ram?.verdict === "does_not_fit") return t("heading_ram");
  if (answer.verdict === "fits_with_offload") return t("heading_offload");
  return t(answer.verdict === "fits" ? "heading_fits" : "heading_unknown");
}

/** The card's sentence, and system memory's own where that is short. @param {Answer} answer @returns {string[]} */
export function sentencesOf({ message, ram }) {
  const short = ram && (ram.verdict === "does_not_fit" || ram.short > 0);
  return short && !message.includes(ram.message) ? [message, ram.message] : [message];
}

/** @param {Ask} ask @returns {Promise<Decision>} */
function open(ask) {
  const { answer, make } = ask;
  const verdict = ask.failed ? "does_not_fit" : answer.verdict;
  const marked = answer.verdict === "does_not_fit" ? offender(answer) : null;
  const fixes = fixChooser(answer.fixes, make !== undefined);
  const cancel = button("cancel", ask.cancel);
  const run = ask.run ? [button("run", ask.run)] : [];
  const apply = make && ask.apply && fixes.chosen() ? [button("apply", ask.apply)] : [];
  const remember = h("input", { type: "checkbox" });
  remember.checked = ask.remembered === true;
  const failure = h("p", { class: "vrh-failure", role: "alert" });
  const dialog = h(
    "dialog",
    { id: QUESTION_ID, class: "vrh-question", "aria-labelledby": TITLE_ID, "aria-describedby": MESSAGE_ID },
    h(
      "div",
      { class: "vrh-question-head" },
      icon(verdict === "fits" || verdict === "fits_with_offload" ? "card" : "triangle", "vrh-question-icon"),
      h("div", {}, h("h1", { id: TITLE_ID }, ask.heading), h("div", { id: MESSAGE_ID }, ...ask.told.map((words) => h("p", {}, words)))),
    ),
    h(
      "div",
      { class: "vrh-question-body", tabindex: "0", role: "group", "aria-label": t("question_body") },
      ...timeline(answer, marked),
      ...fixes.elements,
      ...figures(answer, marked),
    ),
    failure,
    h(
      "div",
      { class: "vrh-question-foot" },
      h(
        "div",
        { class: "vrh-question-aside" },
        ...(ask.remembered === undefined ? [] : [h("label", {}, remember, t("question_remember"))]),
        ...(ask.copy ? [copyButton(ask.copy)] : []),
      ),
      h("div", { class: "vrh-question-choices" }, cancel, ...run, ...apply),
    ),
  );
  dialog.dataset.verdict = verdict;
  document.body.append(dialog);
  const returnTo = document.activeElement;
  return new Promise((resolve, reject) => {
    const giveBackTheKeys = keepEventsInside(dialog);
    const end = () => {
      giveBackTheKeys();
      dialog.remove();
      if (returnTo instanceof HTMLElement && returnTo.isConnected) returnTo.focus({ preventScroll: true });
    };
    cancel.addEventListener("click", () => dialog.close("cancel"));
    for (const element of run) element.addEventListener("click", () => dialog.close("run"));
    for (const element of apply) {
      element.addEventListener("click", async () => {
        const fix = fixes.chosen();
        if (!fix || !make) return;
        setText(failure, "");
        element.disabled = true;
        try {
          await make(fix);
          dialog.close("apply");
        } catch (error) {
          setText(failure, error instanceof Error ? error.message : String(error));
        } finally {
          element.disabled = false;
        }
      });
    }
    dialog.addEventListener("close", () => {
      end();
      const { returnValue } = dialog;
      resolve({ choice: returnValue === "run" || returnValue === "apply" ? returnValue : "cancel", remember: remember.checked });
    });
    try {
      dialog.showModal();
      dialog.dataset.theme = isOnLight(dialog) ? "light" : "dark";
      cancel.focus();
    } catch (error) {
      end();
      reject(error);
    }
  });
}

/** @param {"cancel" | "run" | "apply"} decision @param {string} label */
function button(decision, label) {
  return h("button", { type: "button", "data-decision": decision, ...(decision === "cancel" ? { autofocus: "" } : {}) }, label);
}

/** @param {() => Promise<boolean>} copy */
function copyButton(copy) {
  const element = h("button", { type: "button", class: "vrh-copy" }, t("copy"));
  const told = h("span", { class: "vrh-spoken", role: "status" });
  element.addEventListener("click", async () => {
    const done = await copy().catch(() => false);
    setText(element, t(done ? "copy_done" : "copy_refused"));
    setText(told, t(done ? "copy_done_spoken" : "copy_refused_spoken"));
  });
  return h("span", {}, element, told);
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

/** Every number there is, for whoever wants them. @param {Answer} answer @param {number | null} marked @returns {HTMLElement[]} */
function figures(answer, marked) {
  const parts = [...phases(answer, marked), ...models(answer.models), ...assumptions(answer.assumptions)];
  return parts.length ? [h("details", { class: "vrh-figures" }, h("summary", {}, t("figures")), ...parts)] : [];
}

/** @param {Answer} answer @param {number | null} marked @returns {HTMLElement[]} */
function phases(answer, marked) {
  if (answer.phases.length === 0) return [];
  const head = [t("column_phase"), t("column_needs"), t("column_free"), t("column_outcome")].map((words) => h("th", { scope: "col" }, words));
  return [
    h(
      "table",
      { class: "vrh-phase-table" },
      h("caption", {}, t("phases_name")),
      h("thead", {}, h("tr", {}, ...head)),
      h("tbody", {}, ...stretches(answer, marked).map(phaseRow)),
    ),
  ];
}

/** @param {Stretch} stretch */
function phaseRow({ phase, times, marked }) {
  const shape = shapeWords(phase);
  const short = phase.short > 0 || marked;
  const known = phase.needed !== null && phase.available !== null;
  const outcome = phase.short > 0 ? t("phase_short", { size: size(phase.short) }) : t(marked ? "outcome_does_not_fit" : known ? "outcome_fits" : "not_known");
  const name = times > 1 ? t("phase_times", { title: phase.title, n: times }) : phase.title;
  return h(
    "tr",
    { "data-short": String(short), ...(marked ? { "data-offender": "true" } : {}) },
    h("th", { scope: "row" }, name, ...(shape ? [h("small", {}, shape)] : [])),
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
  const head = [t("column_file"), t("column_role"), t("column_size")].map((words) => h("th", { scope: "col" }, words));
  return [
    h(
      "table",
      { class: "vrh-models" },
      h("caption", {}, t("models_title")),
      h("thead", {}, h("tr", {}, ...head)),
      h("tbody", {}, ...rows),
    ),
  ];
}

/** @param {string[]} list @returns {HTMLElement[]} */
function assumptions(list) {
  if (list.length === 0) return [];
  const items = list.map((assumption) => h("li", {}, assumption));
  return [h("div", { class: "vrh-assumptions" }, h("p", {}, t("assumptions")), h("ul", {}, ...items))];
}
