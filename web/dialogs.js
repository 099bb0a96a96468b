// When the dialog opens and with which words: before queueing, after a refusal, after running out of memory, and when asked for.

import { toldOf } from "./accidents.js";
import { apply } from "./canvas.js";
import * as comfy from "./comfy.js";
import { graphKey } from "./content.js";
import { copy, report } from "./diagnostics.js";
import { headingOf, question, sentencesOf } from "./question.js";
import { t } from "./strings.js";

/**
 * @import { Accident } from "./accidents.js"
 * @import { Answer, Fix } from "./answers.js"
 * @import { Applied } from "./canvas.js"
 * @import { Decision } from "./preflight.js"
 * @import { Remembered } from "./remembered.js"
 */

export class Dialogs {
  #remembered;
  #settings;

  /**
   * @param {Remembered} remembered
   * @param {() => Record<string, unknown>} settings for the report
   */
  constructor(remembered, settings) {
    this.#remembered = remembered;
    this.#settings = settings;
  }

  /** @param {Answer} answer @param {any} prompt @param {boolean} refused @returns {Promise<Decision>} */
  async beforeQueueing(answer, prompt, refused) {
    const told = sentencesOf(answer);
    const maker = makerOf(prompt);
    const decision = await question({
      answer,
      heading: headingOf(answer),
      told: refused ? [t("question_refused"), ...told] : told,
      cancel: t("choice_cancel"),
      run: t("choice_run"),
      apply: t("choice_apply_and_run"),
      make: maker.make,
      remembered: this.#remembered.has(graphKey(prompt)),
      copy: () => this.#copy(answer),
    });
    const applied = maker.applied();
    return { ...decision, ...(applied ? { applied } : {}) };
  }

  /** @param {Accident} accident @param {Answer} answer what the check says of it now */
  async afterRunningOut(accident, answer) {
    const maker = makerOf(accident.posted.output);
    const { choice } = await question({
      answer,
      heading: t("ran_out", { node: accident.node }),
      told: toldOf(accident, answer),
      failed: true,
      cancel: t("choice_close"),
      apply: t("choice_apply_and_run"),
      make: maker.make,
      copy: () => this.#copy(answer, `${accident.node}: ${accident.message}`),
    });
    const applied = maker.applied();
    if (choice !== "apply" || !applied) return;
    try {
      await comfy.app.queuePrompt(0, 1);
    } finally {
      applied.done();
    }
  }

  /** @param {Answer} answer @param {any} prompt */
  async asked(answer, prompt) {
    const maker = makerOf(prompt);
    const graph = graphKey(prompt);
    const decision = await question({
      answer,
      heading: headingOf(answer),
      told: sentencesOf(answer),
      cancel: t("choice_close"),
      apply: t("choice_apply"),
      make: maker.make,
      remembered: this.#remembered.has(graph),
      copy: () => this.#copy(answer),
    });
    this.#remembered.set(graph, decision.remember);
    maker.applied()?.done();
  }

  /** @param {Answer} [answer] @param {string} [error] */
  async #copy(answer, error) {
    const status = await comfy.fetchStatus().then((response) => response.json()).catch(String);
    const frontend = window.__COMFYUI_FRONTEND_VERSION__;
    return copy(report({ status, frontend, settings: this.#settings(), ...(answer ? { check: answer.raw } : {}), ...(error ? { error } : {}) }));
  }
}

/** @param {any} prompt */
function makerOf(prompt) {
  /** @type {Applied | undefined} */
  let applied;
  return {
    /** @param {Fix} fix */
    make: async (fix) => {
      applied = await apply(comfy.app, prompt, fix.changes);
    },
    applied: () => applied,
  };
}
