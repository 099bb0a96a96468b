// Makes the changes of a fix on the canvas: widgets get other values, a node gives way to one of another class. All of it is one
// step of undo, and what can't be made whole is not made at all.

import { canonical } from "./content.js";
import { t } from "./strings.js";

/**
 * @import { Change, ReplaceNode, SetInput } from "./answers.js"
 *
 * @typedef {Record<string, { class_type: string, inputs: Record<string, unknown> }>} Prompt
 * @typedef {{ output: Prompt, workflow: unknown }} Queued
 * @typedef {() => void} Undo
 *
 * @typedef {object} Applied
 * @property {Queued} queued what the canvas stands for now
 * @property {() => void} done closes the step of undo: until then, seeds that change by being queued belong to it
 */

/** The canvas is not what the fix was made for. The message is for a person. */
export class CannotChange extends Error {}

/** New front ends write a state once more 50 ms after it was captured (ChangeTracker.squashState): until then it is not closed. */
const SETTLED_MS = 150;

/** Ids of a subgraph's own input and output node. */
const SUBGRAPH_INPUT = "-10";
const SUBGRAPH_OUTPUT = "-20";

/**
 * @param {ComfyApp} app
 * @param {Prompt} prompt the one that the fix was made for
 * @param {Change[]} changes
 * @returns {Promise<Applied>}
 * @throws {CannotChange} and the canvas is as it was
 */
export async function apply(app, prompt, changes) {
  if (differs(prompt, (await app.graphToPrompt()).output, new Set())) {
    throw new CannotChange(t("canvas_changed"));
  }
  const step = await beginStep(app);
  /** @type {Undo[]} */
  const undos = [];
  try {
    for (const change of changes) {
      if ("classType" in change) replaceNode(app, change, undos);
      else setInput(app, change, undos);
    }
    const queued = await app.graphToPrompt();
    const wrong = differs(patched(prompt, changes), queued.output, new Set(changes.map((change) => change.node)));
    if (wrong) throw new CannotChange(t("canvas_refuses", { node: wrong }));
    return { queued, done: step };
  } catch (error) {
    for (const undo of undos.reverse()) undo();
    app.canvas.setDirty(true, true);
    step();
    throw error instanceof CannotChange ? error : new CannotChange(error instanceof Error ? error.message : String(error));
  }
}

/**
 * Everything until the end of the step is undone at once.
 * @param {ComfyApp} app
 * @returns {Promise<() => void>} ends the step
 */
async function beginStep(app) {
  const workflows = app.extensionManager.workflow;
  const tracker = workflows?.activeWorkflow?.changeTracker;
  if (!tracker) return () => {};
  // what was done before is a step of its own
  tracker.beforeChange();
  tracker.afterChange();
  await new Promise((resolve) => setTimeout(resolve, SETTLED_MS));
  tracker.beforeChange();
  let open = true;
  return () => {
    if (!open) return;
    open = false;
    // another workflow may be on the canvas by now: its state must not be taken for this one's
    if (workflows.activeWorkflow?.changeTracker === tracker) tracker.afterChange();
    else tracker.changeCount -= 1;
  };
}

/** @param {ComfyApp} app @param {SetInput} change @param {Undo[]} undos */
function setInput(app, { node, input, value }, undos) {
  const places = widgetsBehind(chainTo(app, node), input);
  if (places.length === 0) throw new CannotChange(t("canvas_no_widget", { input, node }));
  for (const at of places) {
    const before = at.widget.value;
    undos.push(() => setWidget(app, at, before));
    setWidget(app, at, value);
  }
  app.canvas.setDirty(true, true);
}

/** @param {ComfyApp} app @param {{ node: GraphNode, widget: GraphWidget }} at @param {unknown} value */
function setWidget(app, { node, widget }, value) {
  const before = widget.value;
  widget.value = value;
  widget.callback?.(value, app.canvas, node);
  node.onWidgetChanged?.(widget.name, value, before, widget);
}

/**
 * The nodes from the outermost graph to the one that an id of the prompt names: "128:81" is node 81 in the subgraph of node 128.
 * @param {ComfyApp} app
 * @param {string} id
 * @returns {GraphNode[]} the node itself last
 */
function chainTo(app, id) {
  /** @type {GraphNode[]} */
  const chain = [];
  /** @type {Graph | undefined} */
  let graph = app.rootGraph ?? app.graph;
  for (const part of id.split(":")) {
    /** @type {GraphNode | undefined} */
    const node = graph && nodeIn(graph, part);
    if (!node) throw new CannotChange(t("canvas_no_node", { node: id }));
    chain.push(node);
    graph = node.subgraph;
  }
  return chain;
}

/** Ids are numbers in some front ends and texts in others. @param {Graph} graph @param {string | number} id */
function nodeIn(graph, id) {
  return graph.nodes.find((node) => String(node.id) === String(id));
}

/**
 * Where the value of an input is written: at the node, at a primitive that is linked to it, or outside of the subgraph it is in.
 * @param {GraphNode[]} chain
 * @param {string} name
 * @returns {{ node: GraphNode, widget: GraphWidget }[]} empty where it is written nowhere
 */
function widgetsBehind(chain, name) {
  const node = /** @type {GraphNode} */ (chain.at(-1));
  const slot = (node.inputs ?? []).findIndex((input) => (input.widget?.name ?? input.name) === name);
  const link = linksOf(node).find((l) => String(l.target_id) === String(node.id) && l.target_slot === slot);
  const own = node.widgets?.find((w) => w.name === name);
  if (!link) return own ? [{ node, widget: own }] : [];
  if (String(link.origin_id) === SUBGRAPH_INPUT) {
    const outer = chain.at(-2);
    const promoted = outer?.inputs?.[link.origin_slot];
    if (!outer || !promoted) return [];
    const found = widgetsBehind(chain.slice(0, -1), promoted.widget?.name ?? promoted.name);
    if (found.length || !promoted._widget) return found;
    // 1.35 queues the value of a widget that it does not show, and shows the inner one in its place
    return [{ node: outer, widget: promoted._widget }, ...(own ? [{ node, widget: own }] : [])];
  }
  const origin = nodeIn(node.graph, link.origin_id);
  // a node that only the canvas knows: a primitive, or a reroute of old
  if (!origin?.isVirtualNode) return [];
  const passes = origin.inputs?.[0];
  if (passes) return widgetsBehind([...chain.slice(0, -1), origin], passes.name);
  const widget = origin.widgets?.[0];
  return widget ? [{ node: origin, widget }] : [];
}

/** Read from the graph: a slot's own link is deprecated in new front ends, and a subgraph's node answers for its outputs instead. @param {GraphNode} node */
function linksOf(node) {
  return [...node.graph.links.values()];
}

/** @param {ComfyApp} app @param {ReplaceNode} change @param {Undo[]} undos */
function replaceNode(app, { node: id, classType, inputs }, undos) {
  const old = /** @type {GraphNode} */ (chainTo(app, id).at(-1));
  const fresh = window.LiteGraph?.createNode(classType);
  if (!fresh) throw new CannotChange(t("canvas_no_class", { type: classType }));
  fresh.pos = Array.from(old.pos);
  fresh.mode = old.mode;
  undos.push(() => swap(fresh, old));
  swap(old, fresh);
  for (const [name, value] of Object.entries(inputs)) {
    if (isLink(value)) continue;
    const widget = fresh.widgets?.find((w) => w.name === name);
    if (widget) setWidget(app, { node: fresh, widget }, unwrapped(value));
  }
  app.canvas.setDirty(true, true);
}

/**
 * Puts a node in another's place, with its id, and with its links wherever an input of the same name and an output of the same
 * number are there.
 * @param {GraphNode} old
 * @param {GraphNode} fresh
 */
function swap(old, fresh) {
  const graph = old.graph;
  const links = linksOf(old);
  const incoming = links.filter((link) => String(link.target_id) === String(old.id));
  const outgoing = links.filter((link) => String(link.origin_id) === String(old.id));
  const wires = [
    ...incoming.map(({ origin_id, origin_slot, target_slot }) => {
      const name = old.inputs?.[target_slot]?.name;
      return () => {
        const slot = (fresh.inputs ?? []).findIndex((input) => input.name === name);
        const input = fresh.inputs?.[slot];
        if (!input) return;
        if (String(origin_id) === SUBGRAPH_INPUT) graph.inputs?.[origin_slot]?.connect(input, fresh);
        else nodeIn(graph, origin_id)?.connect(origin_slot, fresh, slot);
      };
    }),
    ...outgoing.map(({ origin_slot, target_id, target_slot }) => () => {
      const output = fresh.outputs?.[origin_slot];
      const target = nodeIn(graph, target_id);
      if (!output) return;
      if (String(target_id) === SUBGRAPH_OUTPUT) graph.outputs?.[target_slot]?.connect(output, fresh);
      else if (target) fresh.connect(origin_slot, target, target_slot);
    }),
  ];
  const { id } = old;
  graph.remove(old);
  fresh.id = id;
  graph.add(fresh);
  for (const wire of wires) wire();
}

/** @param {Prompt} prompt @param {Change[]} changes @returns {Prompt} what the canvas should stand for after them */
function patched(prompt, changes) {
  const next = structuredClone(prompt);
  for (const change of changes) {
    const node = next[change.node];
    if (!node) throw new CannotChange(t("canvas_not_in_prompt", { node: change.node }));
    if ("classType" in change) next[change.node] = { ...node, class_type: change.classType, inputs: change.inputs };
    else node.inputs[change.input] = Array.isArray(change.value) ? { __value__: change.value } : change.value;
  }
  return next;
}

/**
 * The first node that is not as wanted. Where nothing was to change, seeds and texts may: packs write both as they queue.
 * @param {Prompt} wanted
 * @param {Prompt} found
 * @param {Set<string>} touched
 * @returns {string | null}
 */
function differs(wanted, found, touched) {
  for (const id of new Set([...Object.keys(wanted), ...Object.keys(found)])) {
    const mine = wanted[id];
    const theirs = found[id];
    if (!mine || !theirs || mine.class_type !== theirs.class_type) return id;
    for (const name of new Set([...Object.keys(mine.inputs), ...Object.keys(theirs.inputs)])) {
      const [a, b] = [mine.inputs[name], theirs.inputs[name]];
      const free = /seed/i.test(name) ? typeof a === "number" : !touched.has(id) && typeof a === "string";
      if (canonical(a) !== canonical(b) && !(free && typeof a === typeof b)) return id;
    }
  }
  return null;
}

/** @param {unknown} value */
function isLink(value) {
  return Array.isArray(value) && value.length === 2 && typeof value[0] === "string" && typeof value[1] === "number";
}

/** Arrays are wrapped in a prompt, or they would be read as links. @param {unknown} value */
function unwrapped(value) {
  return typeof value === "object" && value !== null && "__value__" in value ? value.__value__ : value;
}
