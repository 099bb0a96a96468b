// Badges on the nodes of the canvas: put there as nodes are made, and brought up to date when something is known anew.

import { badgeTexts, worstWithin } from "./badge_texts.js";

/**
 * @import { Known } from "./badge_texts.js"
 *
 * @typedef {{ text: string, colours: { fgColor: string, bgColor: string } }} Shown
 */

/** On a ground of their own, so that both themes have them readable: contrast 12:1 and 7:1. */
const PLAIN = Object.freeze({ fgColor: "#e6e7ea", bgColor: "#2c2d31" });
const BAD = Object.freeze({ fgColor: "#ffffff", bgColor: "#8c1d18" });
const NOTHING = Object.freeze({ text: "", colours: PLAIN });

export class NodeBadges {
  #app;
  #Badge;
  #follow;
  /** Read by every badge, so that Vue nodes draw theirs again when it changes; the same one for good, or they would follow an old one. @type {{ rev: number } | null} */
  #state = null;
  #on = false;
  /** @type {WeakMap<GraphNode, () => NodeBadge>} */
  #attached = new WeakMap();
  /** @type {Map<string, Shown>} by id of the node in the prompt */
  #shown = new Map();
  /** Also of nodes that are gone: front end 1.49 asks the badges of the node that an undo has made anew. @type {WeakMap<GraphNode, string>} */
  #ids = new WeakMap();
  /** @type {WeakMap<GraphNode, { shown: Shown, badge: NodeBadge }>} */
  #made = new WeakMap();

  /**
   * @param {ComfyApp} app
   * @param {() => NodeBadgeClass | undefined} badgeClass
   * @param {(state: { rev: number }) => { rev: number }} follow
   */
  constructor(app, badgeClass, follow) {
    this.#app = app;
    this.#Badge = badgeClass;
    this.#follow = follow;
  }

  /** @param {boolean} on */
  switch(on) {
    if (on === this.#on) return;
    this.#on = on;
    this.#shown.clear();
    this.#redraw();
  }

  /**
   * Vue nodes see only the badges that a node is made with, so each has one from its start that says nothing until it has something
   * to say, and nothing again when badges are switched off.
   * @param {GraphNode} node
   */
  created(node) {
    this.#state ??= this.#follow({ rev: 0 });
    if (!this.#Badge() || !Array.isArray(node.badges) || this.#attached.has(node)) return;
    const badge = () => this.#badge(node);
    this.#attached.set(node, badge);
    node.badges.push(badge);
  }

  /** @param {Known} known */
  show(known) {
    if (!this.#on) return;
    const texts = badgeTexts(known);
    /** @type {Map<string, Shown>} */
    const next = new Map();
    /** @type {Map<GraphNode, string>} several nodes of one subgraph share what is in it: the last says it */
    const ids = new Map();
    for (const [id, node] of this.#nodes()) {
      const said = node.subgraph ? worstWithin(texts, id) : texts.get(id);
      if (!said) continue;
      this.created(node);
      ids.set(node, id);
      next.set(id, { text: said.text, colours: said.bad ? BAD : PLAIN });
    }
    const madeAnew = [...ids].some(([node, id]) => this.#ids.get(node) !== id);
    if (!madeAnew && same(this.#shown, next)) return;
    for (const [node, id] of ids) this.#ids.set(node, id);
    this.#shown = next;
    this.#redraw();
  }

  /** @param {GraphNode} node @returns {NodeBadge} the same one until it says something else: the canvas asks at every frame */
  #badge(node) {
    void this.#state?.rev;
    const shown = this.#shown.get(this.#ids.get(node) ?? "") ?? NOTHING;
    const made = this.#made.get(node);
    if (made?.shown === shown) return made.badge;
    const Badge = /** @type {NodeBadgeClass} */ (this.#Badge());
    const badge = new Badge({ text: shown.text, ...shown.colours });
    this.#made.set(node, { shown, badge });
    return badge;
  }

  #redraw() {
    if (this.#state) this.#state.rev += 1;
    this.#app.canvas?.setDirty(true, true);
  }

  /** Every node with its id in the prompt, "128:81" for one in a subgraph. @returns {Iterable<[string, GraphNode]>} */
  #nodes() {
    return within(this.#app.rootGraph ?? this.#app.graph, "");
  }
}

/** @param {Graph | undefined} graph @param {string} prefix @returns {Iterable<[string, GraphNode]>} */
function* within(graph, prefix) {
  for (const node of graph?.nodes ?? []) {
    const id = `${prefix}${node.id}`;
    yield [id, node];
    if (node.subgraph) yield* within(node.subgraph, `${id}:`);
  }
}

/** @param {ReadonlyMap<string, Shown>} a @param {ReadonlyMap<string, Shown>} b */
function same(a, b) {
  if (a.size !== b.size) return false;
  for (const [id, { text, colours }] of a) {
    const other = b.get(id);
    if (other?.text !== text || other.colours !== colours) return false;
  }
  return true;
}

/** Whether reading the canvas has no effect. Widgets that upload (a webcam, a 3D view) do so in an async serializeValue. @param {ComfyApp} app */
export function isQuiet(app) {
  for (const [, node] of within(app.rootGraph ?? app.graph, "")) {
    for (const widget of node.widgets ?? []) {
      if (typeof widget.serializeValue === "function" && widget.serializeValue.constructor.name === "AsyncFunction") return false;
    }
  }
  return true;
}
