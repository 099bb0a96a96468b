// The ranked fixes in the dialog: one to choose of those that change the graph, and those a person has to make.

import { h } from "./dom.js";
import { t } from "./strings.js";
import { costWords, size } from "./text.js";

/** @import { Fix } from "./answers.js" */

/**
 * @param {Fix[]} fixes best first
 * @param {boolean} canMake whether one can be chosen here
 * @returns {{ elements: HTMLElement[], chosen: () => Fix | undefined }}
 */
export function fixChooser(fixes, canMake) {
  if (fixes.length === 0) return { elements: [], chosen: () => undefined };
  /** @type {Map<Fix, HTMLInputElement>} */
  const radios = new Map();
  const rows = fixes.map((fix) => {
    const radio = canMake && fix.changes.length > 0 ? h("input", { type: "radio", name: "vram-headroom-fix", value: fix.id }) : null;
    if (radio) {
      radio.checked = radios.size === 0;
      radios.set(fix, radio);
    }
    return row(fix, radio);
  });
  const chosen = () => [...radios].find(([, radio]) => radio.checked)?.[0];
  return { elements: [h("fieldset", { class: "vrh-fixes" }, h("legend", {}, t("fixes_legend")), ...rows)], chosen };
}

/** @param {Fix} fix @param {HTMLInputElement | null} radio */
function row(fix, radio) {
  const cost = [costWords(fix), fix.note].filter(Boolean).join(". ");
  const words = h(
    "span",
    { class: "vrh-fix-words" },
    h("span", {}, fix.title),
    ...(cost ? [h("small", {}, cost)] : []),
    ...(radio || fix.changes.length ? [] : [h("small", {}, t("fix_by_hand"))]),
  );
  const saved = h("span", { class: "vrh-fix-saves" }, ...(fix.saves > 0 ? [`−${size(fix.saves)}`] : []));
  const mark = radio ?? h("i", { class: "vrh-fix-mark", "aria-hidden": "true" });
  return h(radio ? "label" : "div", { class: "vrh-fix", "data-fix": fix.id }, mark, words, saved);
}
