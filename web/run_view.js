// A run on the page: the drawing, and below it the phases in words. One phase at a time shows what its figure is made of.

import { h, setAttribute, setHidden, setText, svg } from "./dom.js";
import { t } from "./strings.js";

/** @import { Bar, Chart, Mark, PhaseRow } from "./chart.js" */

const TERMS_ID = "vram-headroom-terms";

export class RunView {
  element;
  #title = h("h3", {});
  #caption = h("span", {});
  #note = h("p", {});
  #figure;
  #bars = svg("g", {});
  #others = svg("rect", { class: "vrh-plot-others", x: "0", width: "1000" });
  #halo = svg("path", { class: "vrh-plot-halo", d: "" });
  #line = svg("path", { class: "vrh-plot-line", d: "" });
  #head = h("i", { class: "vrh-plot-head" });
  #peak = h("i", { class: "vrh-plot-peak" }, h("span", {}));
  #limit = h("i", { class: "vrh-plot-limit" }, h("span", {}));
  #marks = h("div", {});
  #numbers = h("div", { class: "vrh-numbers", "aria-hidden": "true" });
  #plot;
  #sentence = h("p", { class: "vrh-sentence" });
  #incidents = h("ul", { class: "vrh-incidents" });
  #list;
  #keys = h("ul", { class: "vrh-parts" });
  #hint = h("p", { class: "vrh-hint" }, t("terms_hint"));
  /** @type {PhaseView[]} */
  #phases = [];
  #selected = -1;
  #drawn = "";
  /** @type {Chart | null} */
  #chart = null;

  constructor() {
    const parts = [this.#bars, this.#others, this.#halo, this.#line];
    const drawing = svg("svg", { viewBox: "0 0 1000 100", preserveAspectRatio: "none", "aria-hidden": "true" }, ...parts);
    this.#plot = h("div", { class: "vrh-plot", role: "img" }, this.#limit, this.#marks, this.#peak, this.#head);
    this.#plot.prepend(drawing);
    this.#figure = h("figure", { class: "vrh-chart" }, this.#plot, this.#numbers, h("figcaption", {}, this.#keys));
    this.#list = h("ol", { class: "vrh-phase-list", "aria-label": t("phases_name") });
    this.element = h(
      "section",
      { class: "vrh-run", "aria-label": t("run_title") },
      h("div", { class: "vrh-line" }, this.#title, this.#caption),
      this.#note,
      this.#figure,
      this.#sentence,
      this.#incidents,
      this.#list,
      this.#hint,
    );
    // "over" bubbles and comes once for each bar; the rows below grow, so the pointer stays where it is
    this.#bars.addEventListener("pointerover", (event) => this.#select(indexOf(event.target)));
    this.#list.addEventListener("keydown", (event) => this.#moved(event));
  }

  /** @param {Chart | null} chart @param {boolean} isRunning */
  show(chart, isRunning) {
    const drawn = JSON.stringify([chart, isRunning]);
    if (drawn === this.#drawn) return;
    this.#drawn = drawn;
    this.#chart = chart;
    setText(this.#title, t(isRunning || !chart ? "run_title" : "run_last"));
    setText(this.#caption, chart?.caption ?? "");
    setText(this.#note, chart ? (chart.bars.length ? "" : t("run_unplanned")) : t("run_none"));
    setHidden(this.#note, this.#note.textContent === "");
    setHidden(this.#figure, !chart);
    setHidden(this.#hint, !chart?.rows.length);
    if (!chart) {
      this.#rows([]);
      this.#incidents.replaceChildren();
      setText(this.#sentence, "");
      return;
    }
    this.#draw(chart);
    setText(this.#sentence, chart.sentence);
    this.#incidents.replaceChildren(...chart.incidents.map(({ kind, words }) => h("li", { "data-kind": kind }, words)));
    this.#rows(chart.rows);
  }

  /** @param {Chart} chart */
  #draw(chart) {
    const { bars, line, head, peak, limit, others, limitWords } = chart;
    this.#bars.replaceChildren(...bars.map(drawBar));
    setAttribute(this.#others, "y", String(100 - (limit ?? 0)));
    setAttribute(this.#others, "height", String(others));
    for (const path of [this.#halo, this.#line]) setAttribute(path, "d", line);
    place(this.#limit, limit === null ? null : { left: 0, bottom: limit }, limitWords);
    place(this.#head, head, "");
    place(this.#peak, peak, peak?.words ?? "");
    setAttribute(this.#peak, "data-side", peak && peak.left > 70 ? "left" : "right");
    this.#marks.replaceChildren(...chart.incidents.map(drawMark));
    this.#numbers.replaceChildren(...bars.map(({ width }, i) => h("span", { style: `flex-grow:${width}` }, String(i + 1))));
    setAttribute(this.#plot, "aria-label", chart.sentence || chart.caption);
    const keys = [
      ...(bars.length ? [h("li", {}, h("i", { "data-key": "predicted" }), t("key_predicted"))] : []),
      ...(line ? [h("li", {}, h("i", { "data-key": "measured" }), t("key_measured"))] : []),
      ...(limit === null ? [] : [h("li", {}, h("i", { "data-key": "limit" }), t("key_limit"))]),
      ...(others > 0 ? [h("li", {}, h("i", { "data-key": "others" }), t("key_others"))] : []),
    ];
    if (this.#keys.childElementCount !== keys.length) this.#keys.replaceChildren(...keys);
    this.#mark();
  }

  /** @param {PhaseRow[]} rows */
  #rows(rows) {
    while (this.#phases.length > rows.length) this.#phases.pop()?.element.remove();
    while (this.#phases.length < rows.length) {
      const at = this.#phases.length;
      const view = new PhaseView(at, () => this.#select(this.#selected === at ? -1 : at));
      this.#phases.push(view);
      this.#list.append(view.element);
    }
    if (this.#selected >= rows.length) this.#selected = -1;
    rows.forEach((row, i) => this.#phases[i]?.show(row, i === this.#selected));
  }

  /** @param {number} index -1: none */
  #select(index) {
    if (index === this.#selected || !this.#chart) return;
    this.#selected = index;
    this.#chart.rows.forEach((row, i) => this.#phases[i]?.show(row, i === index));
    this.#mark();
  }

  #mark() {
    [...this.#bars.children].forEach((bar, i) => setAttribute(bar, "data-selected", i === this.#selected ? "true" : null));
  }

  /** @param {KeyboardEvent} event */
  #moved(event) {
    const at = this.#phases.findIndex((view) => view.button === document.activeElement);
    const last = this.#phases.length - 1;
    const to = { ArrowDown: at + 1, ArrowRight: at + 1, ArrowUp: at - 1, ArrowLeft: at - 1, Home: 0, End: last }[event.key];
    if (at < 0 || to === undefined) return;
    event.preventDefault();
    // the canvas behind listens to arrow keys as well
    event.stopPropagation();
    const next = Math.min(last, Math.max(0, to));
    this.#phases[next]?.button.focus();
    this.#select(next);
  }
}

class PhaseView {
  element;
  button;
  #title = h("b", {});
  #state = h("span", {});
  #figures = h("div", {});
  #notes = h("div", { class: "vrh-notes" });
  #terms;
  #drawn = "";

  /** @param {number} index @param {() => void} pressed */
  constructor(index, pressed) {
    this.#terms = h("div", { class: "vrh-terms", id: `${TERMS_ID}-${index}`, hidden: "" });
    this.button = h("button", { type: "button", "aria-controls": this.#terms.id }, h("span", { class: "vrh-line" }, this.#title, this.#state));
    this.button.addEventListener("click", pressed);
    this.element = h("li", { class: "vrh-phase-row" }, this.button, this.#figures, this.#notes, this.#terms);
  }

  /** @param {PhaseRow} row @param {boolean} open */
  show(row, open) {
    setAttribute(this.element, "data-state", row.at);
    setText(this.#title, row.title);
    setText(this.#state, row.state);
    setText(this.#figures, row.figures);
    setText(this.#notes, row.notes.join(" · "));
    setHidden(this.#notes, row.notes.length === 0);
    setAttribute(this.button, "aria-expanded", String(open));
    setHidden(this.#terms, !open);
    const drawn = open ? JSON.stringify([row.terms, row.bounds]) : "";
    if (drawn === this.#drawn) return;
    this.#drawn = drawn;
    const terms = h("dl", {}, ...row.terms.map(({ name, size }) => h("div", {}, h("dt", {}, name), h("dd", {}, size))));
    this.#terms.replaceChildren(...(open ? [...(row.terms.length ? [terms] : []), ...row.bounds.map((words) => h("p", {}, words))] : []));
  }
}

/** @param {Bar} bar @param {number} index */
function drawBar({ left, width, kind, weights, work, upper, measured, short, state }, index) {
  /** @param {string} part @param {number} from @param {number} height percent */
  const rect = (part, from, height) =>
    svg("rect", { "data-part": part, x: String(left), width: String(width), y: String(100 - from - height), height: String(height) });
  /** @param {string} part @param {number} at */
  const level = (part, at) => svg("line", { "data-part": part, x1: String(left), x2: String(left + width), y1: String(100 - at), y2: String(100 - at) });
  return svg(
    "g",
    { "data-index": String(index), "data-kind": kind, "data-state": state, ...(short ? { "data-short": "true" } : {}) },
    rect("room", 0, 100),
    ...(weights === null ? [rect("unknown", 0, 12)] : [rect("weights", 0, weights), rect("work", weights, work)]),
    ...(upper === null ? [] : [level("upper", upper)]),
    ...(measured === null ? [] : [level("measured", measured)]),
  );
}

/** The signs of incidents that are close to each other stand side by side. @param {Mark} mark @param {number} index @param {Mark[]} all */
function drawMark({ left, kind }, index, all) {
  const nth = all.slice(0, index).filter((other) => Math.abs(other.left - left) < 5).length;
  return h("i", { class: "vrh-plot-mark", "data-kind": kind, style: `left:${left}%;--vrh-nth:${nth}` });
}

/** @param {EventTarget | null} target */
function indexOf(target) {
  const bar = target instanceof Element ? target.closest("[data-index]") : null;
  return bar ? Number(bar.getAttribute("data-index")) : -1;
}

/** @param {HTMLElement} element @param {{ left: number, bottom: number } | null} at percent @param {string} words */
function place(element, at, words) {
  setHidden(element, at === null);
  if (at) setAttribute(element, "style", `left:${at.left}%;bottom:${at.bottom}%`);
  const label = element.firstElementChild;
  if (label) setText(label, words);
}
