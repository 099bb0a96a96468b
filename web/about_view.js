// "About this machine", folded: versions, where the pack holds on to ComfyUI, and whether its estimates agree with the installed code.

import { h } from "./dom.js";
import { t } from "./strings.js";
import { size } from "./text.js";

/** @import { Seam, Status } from "./status.js" */

export class AboutView {
  element;
  #body = h("div", {});
  #drawn = "";

  constructor() {
    this.element = h("details", { class: "vrh-about" }, h("summary", {}, t("about_title")), this.#body);
  }

  /** @param {Status} status */
  show({ version, host, seams, selfCheck }) {
    const drawn = JSON.stringify([version, host, seams, selfCheck]);
    if (drawn === this.#drawn) return;
    this.#drawn = drawn;
    const check = selfCheck?.rows ?? [];
    this.#body.replaceChildren(
      h("p", {}, t("about_pack", { version })),
      ...(host ? [h("p", {}, t("about_comfyui", { version: host.version, patchers: host.patchers, state: host.vramState }))] : []),
      h("h4", {}, t("about_seams")),
      h("ul", {}, ...seams.map((seam) => h("li", { "data-seam": seam.state }, h("span", {}, seamWords(seam)), h("b", {}, stateWord(seam))))),
      h("h4", {}, t("about_check")),
      h("p", {}, selfCheck?.message || t("check_none")),
      h("ul", {}, ...check.map(({ name, expected, traced }) => h("li", {}, t("check_row", { name, expected: size(expected), traced: size(traced) })))),
    );
  }
}

/** What is lost is told only where it is lost. @param {Seam} seam */
function seamWords({ name, state, withoutIt }) {
  return state === "live" || !withoutIt ? name : t("seam_without", { name, without: withoutIt });
}

/** @param {Seam} seam */
function stateWord({ state }) {
  return state === "live" ? t("seam_live") : state === "off" ? t("seam_off") : t("seam_absent");
}
