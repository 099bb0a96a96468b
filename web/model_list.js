// The list of pipelines and models with what can be done with each. Rows stay while their figures change, so that focus does.

import { h, setAttribute, setHidden, setText } from "./dom.js";
import { t } from "./strings.js";

/**
 * @import { Action, ActionName, Group, Inventory, Row } from "./inventory.js"
 *
 * @typedef {(action: ActionName, key: number | null, name: string) => void} Ask
 */

export class ModelList {
  element;
  #free;
  #none = h("p", {}, t("models_none"));
  #groups = h("div", {});
  /** @type {Map<string, GroupView>} */
  #views = new Map();

  /** @param {Ask} ask */
  constructor(ask) {
    this.#free = new Button((action) => ask(action.name, null, t("everything")));
    const head = h("div", { class: "vrh-line" }, h("h3", {}, t("models_title")), this.#free.element);
    this.element = h("section", { class: "vrh-models-list", "aria-label": t("models_title") }, head, this.#free.waits, this.#none, this.#groups);
    this.#ask = ask;
  }

  #ask;

  /** @param {Inventory} inventory */
  show({ groups, free }) {
    this.#free.show(free);
    setHidden(this.#none, groups.length > 0);
    const views = groups.map((group) => {
      const view = this.#views.get(group.id) ?? new GroupView(this.#ask);
      view.show(group);
      return /** @type {const} */ ([group.id, view]);
    });
    this.#views = new Map(views);
    arrange(this.#groups, views.map(([, view]) => view.element));
  }
}

class GroupView {
  element;
  #dot = h("i", { class: "vrh-dot", "aria-hidden": "true" });
  #title = h("b", {});
  #state = h("span", {});
  #list = h("ul", { class: "vrh-rows" });
  /** @type {Map<string, RowView>} */
  #rows = new Map();
  #ask;

  /** @param {Ask} ask */
  constructor(ask) {
    this.#ask = ask;
    this.element = h("section", { class: "vrh-group" }, h("h4", { class: "vrh-line" }, h("span", {}, this.#dot, this.#title), this.#state), this.#list);
  }

  /** @param {Group} group */
  show({ title, state, dot, rows }) {
    setHidden(this.#dot, dot === null);
    setAttribute(this.#dot, "data-dot", dot);
    setText(this.#title, title);
    setText(this.#state, state);
    const views = rows.map((row) => {
      const view = this.#rows.get(row.id) ?? new RowView(this.#ask);
      view.show(row);
      return /** @type {const} */ ([row.id, view]);
    });
    this.#rows = new Map(views);
    arrange(this.#list, views.map(([, view]) => view.element));
  }
}

class RowView {
  element;
  #dot = h("i", { class: "vrh-dot", "aria-hidden": "true" });
  #name = h("b", {});
  #dotWords = h("span", { class: "vrh-spoken" });
  #size = h("span", {});
  #facts = h("div", {});
  #state = h("span", {});
  #buttons;
  /** @type {Row | null} */
  #row = null;

  /** @param {Ask} ask */
  constructor(ask) {
    this.#buttons = [0, 1].map(() => new Button((action) => this.#row && ask(action.name, this.#row.key, this.#row.name)));
    this.element = h(
      "li",
      { class: "vrh-model" },
      h("div", { class: "vrh-line" }, h("span", { class: "vrh-model-name" }, this.#dot, this.#name, this.#dotWords), this.#size),
      this.#facts,
      h("div", { class: "vrh-line" }, this.#state, h("span", { class: "vrh-buttons" }, ...this.#buttons.map((b) => b.element))),
      ...this.#buttons.map((b) => b.waits),
    );
  }

  /** @param {Row} row */
  show(row) {
    this.#row = row;
    setAttribute(this.#dot, "data-dot", row.dot);
    setText(this.#dotWords, `, ${row.dotWords}`);
    setText(this.#name, row.name);
    setAttribute(this.#name, "title", row.name);
    setText(this.#size, row.size);
    setText(this.#facts, row.facts);
    setText(this.#state, row.state);
    row.actions.forEach((action, i) => this.#buttons[i]?.show(action));
  }
}

/** Refused while it can't be done, yet reached by the keyboard, so that its reason is. */
class Button {
  element = h("button", { type: "button" });
  waits = h("p", { class: "vrh-waits" });
  /** @type {Action | null} */
  #action = null;

  /** @param {(action: Action) => void} pressed */
  constructor(pressed) {
    this.element.addEventListener("click", () => {
      if (this.#action && !this.#action.reason) pressed(this.#action);
    });
  }

  /** @param {Action} action */
  show(action) {
    this.#action = action;
    setText(this.element, action.label);
    setAttribute(this.element, "data-action", action.name);
    setAttribute(this.element, "aria-label", action.spoken);
    setAttribute(this.element, "title", action.reason ? action.spoken : null);
    setAttribute(this.element, "aria-disabled", action.reason ? "true" : null);
    setText(this.waits, action.waits);
    setHidden(this.waits, !action.waits);
  }
}

/** Only what is out of place is moved: moving an element takes the focus from it. @param {Element} parent @param {Element[]} children */
function arrange(parent, children) {
  for (const child of [...parent.children]) if (!children.includes(child)) child.remove();
  for (const [i, child] of children.entries()) if (parent.children[i] !== child) parent.insertBefore(child, parent.children[i] ?? null);
}
