/**
 * What our nodes have to say of their last run, on the node itself. ComfyUI's own progress text goes when the prompt has ended.
 */

const OURS = "VRAMHeadroom";
const WIDGET = "vram_headroom_said";
const LINE_HEIGHT = 16;

/**
 * @typedef {object} Widget
 * @property {string} name
 * @property {HTMLElement} [element]
 * @property {boolean} [serialize]
 */

/**
 * @typedef {object} SayingNode
 * @property {Widget[]} [widgets]
 * @property {[number, number]} size
 * @property {(name: string, type: string, element: HTMLElement, options: object) => Widget} [addDOMWidget]
 * @property {() => [number, number]} [computeSize]
 * @property {(size: [number, number]) => void} [setSize]
 */

/**
 * Keeps the text of a node's last run on it, for every node class of ours.
 * @param {{ prototype: any }} nodeType
 * @param {{ name?: string }} nodeData
 */
export function keepWhatIsSaid(nodeType, nodeData) {
  if (!nodeData.name?.startsWith(OURS)) return;
  const before = nodeType.prototype.onExecuted;
  /** @this {SayingNode} @param {any} output */
  nodeType.prototype.onExecuted = function (output) {
    before?.call(this, output);
    const text = output?.text?.[0];
    if (typeof text === "string") show(this, text);
  };
}

/**
 * @param {SayingNode} node
 * @param {string} text
 */
function show(node, text) {
  const widget = node.widgets?.find((one) => one.name === WIDGET) ?? add(node);
  if (!widget?.element) return;
  widget.element.textContent = text;
  const needed = node.computeSize?.();
  if (needed && needed[1] > node.size[1]) node.setSize?.([node.size[0], needed[1]]);
}

/**
 * @param {SayingNode} node
 * @returns {Widget | undefined}
 */
function add(node) {
  if (!node.addDOMWidget) return undefined;
  const element = document.createElement("div");
  element.className = "vram-headroom-said";
  element.setAttribute("role", "note");
  const height = 3 * LINE_HEIGHT + 4;
  const widget = node.addDOMWidget(WIDGET, "text", element, {
    serialize: false,
    hideOnZoom: true,
    getMinHeight: () => height,
  });
  // no value of the graph: neither in what is queued nor in what is saved
  widget.serialize = false;
  return widget;
}
