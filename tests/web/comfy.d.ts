// The part of ComfyUI's front end that web/ uses. Optional: absent in at least one of 1.27.10, 1.35.9, 1.49.6 and 1.58.1, or undocumented.

type Queue = (...args: any[]) => any;

interface ComfySetting {
  id: string;
  name: string;
  type: "boolean" | "combo" | "slider" | "number" | "hidden";
  defaultValue: unknown;
  category?: string[];
  tooltip?: string;
  sortOrder?: number;
  attrs?: Record<string, number>;
  options?: { text: string; value: string }[];
  onChange?: (value: unknown) => void;
}

interface ComfyCommand {
  id: string;
  label: string;
  menubarLabel: string;
  icon: string;
  function: () => void;
}

interface ComfyMenu {
  path: string[];
  commands: string[];
}

interface ComfyBadge {
  text: string;
  variant: "info" | "warning" | "error";
  icon: string;
  tooltip: string;
}

interface ComfySidebarTab {
  id: string;
  icon: string;
  title: string;
  tooltip: string;
  type: "custom";
  render: (element: HTMLElement) => void;
  destroy: () => void;
}

interface ComfyExtension {
  name: string;
  settings?: ComfySetting[];
  commands?: ComfyCommand[];
  menuCommands?: ComfyMenu[];
  aboutPageBadges?: { label: string; url: string; icon: string }[];
  readonly topbarBadges?: ComfyBadge[];
  init?: () => void;
  beforeRegisterNodeDef?: (nodeType: { prototype: any }, nodeData: { name?: string }) => void;
  nodeCreated?: (node: GraphNode) => void;
  afterConfigureGraph?: () => void;
  setup?: () => void;
}

interface ComfyToast {
  severity: "success" | "info" | "warn" | "error";
  summary: string;
  detail: string;
  life: number;
}

interface ChangeTracker {
  changeCount: number;
  beforeChange(): void;
  afterChange(): void;
}

interface Workflow {
  changeTracker?: ChangeTracker;
  activeMode?: string | null;
  initialMode?: string | null;
}

interface GraphLink {
  origin_id: string | number;
  origin_slot: number;
  target_id: string | number;
  target_slot: number;
}

interface GraphWidget {
  name: string;
  serializeValue?: unknown;
  value: unknown;
  callback?: (value: unknown, canvas: unknown, node: GraphNode) => void;
}

interface GraphSlot {
  name: string;
  widget?: { name: string };
  _widget?: GraphWidget;
}

interface SubgraphSlot {
  connect(slot: GraphSlot, node: GraphNode): unknown;
}

interface NodeBadge {
  text: string;
}

type NodeBadgeClass = new (options: { text: string; fgColor: string; bgColor: string }) => NodeBadge;

interface GraphNode {
  badges?: (NodeBadge | (() => NodeBadge))[];
  id: string | number;
  pos: ArrayLike<number>;
  mode: number;
  graph: Graph;
  subgraph?: Graph;
  isVirtualNode?: boolean;
  inputs?: GraphSlot[];
  outputs?: GraphSlot[];
  widgets?: GraphWidget[];
  connect(slot: number, target: GraphNode, targetSlot: number): unknown;
  onWidgetChanged?: (name: string, value: unknown, before: unknown, widget: GraphWidget) => void;
}

interface Graph {
  nodes: GraphNode[];
  links: Map<unknown, GraphLink>;
  inputs?: SubgraphSlot[];
  outputs?: SubgraphSlot[];
  add(node: GraphNode): unknown;
  remove(node: GraphNode): void;
}

interface ComfyApp {
  registerExtension(extension: ComfyExtension): void;
  queuePrompt: Queue;
  graphToPrompt(): Promise<{ output: any; workflow: unknown }>;
  rootGraph?: Graph;
  graph: Graph;
  canvas: { setDirty(foreground: boolean, background: boolean): void };
  extensionManager: {
    setting: { get(id: string): unknown; set(id: string, value: unknown): Promise<void> };
    toast: { add(toast: ComfyToast): void };
    queueSettings?: { mode?: string };
    registerSidebarTab?: (tab: ComfySidebarTab) => void;
    workflow?: { activeWorkflow?: Workflow | null };
  };
  menu?: { settingsGroup: { element: HTMLElement } };
  ui?: { menuContainer?: HTMLElement; autoQueueEnabled?: boolean; settings?: Partial<EventTarget> };
}

interface ComfyApi {
  clientId?: string;
  queuePrompt: Queue;
  apiURL(route: string): string;
  fetchApi(route: string, init?: RequestInit): Promise<Response>;
  addEventListener(type: string, listener: (event: CustomEvent<unknown>) => void): void;
}

type PromptExecutionErrorClass = new (response: { node_errors: object }, status?: number) => Error;

interface Window {
  comfyAPI?: { api?: { PromptExecutionError?: PromptExecutionErrorClass } };
  LGraphBadge?: NodeBadgeClass;
  LiteGraph?: { createNode(type: string): GraphNode | null };
  __COMFYUI_FRONTEND_VERSION__?: string;
}

declare module "*/scripts/app.js" {
  export const app: ComfyApp;
}

declare module "*/scripts/api.js" {
  export const api: ComfyApi;
  export const PromptExecutionError: PromptExecutionErrorClass | undefined;
}
