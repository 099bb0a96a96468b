// The part of ComfyUI's front end that web/comfy.js uses. Optional: absent in at least one of 1.27.10, 1.35.9 and 1.58.1, or undocumented.

type Queue = (...args: any[]) => any;

interface ComfySetting {
  id: string;
  name: string;
  type: "boolean" | "combo";
  defaultValue: unknown;
  category?: string[];
  tooltip?: string;
  options?: { text: string; value: string }[];
  onChange?: (value: unknown) => void;
}

interface ComfyExtension {
  name: string;
  settings?: ComfySetting[];
  init?: () => void;
  beforeRegisterNodeDef?: (nodeType: { prototype: any }, nodeData: { name?: string }) => void;
  setup?: () => void;
}

interface ComfyToast {
  severity: "success" | "info" | "warn" | "error";
  summary: string;
  detail: string;
  life: number;
}

interface ComfyApp {
  registerExtension(extension: ComfyExtension): void;
  queuePrompt: Queue;
  extensionManager: {
    setting: { get(id: string): unknown };
    toast: { add(toast: ComfyToast): void };
    queueSettings?: { mode?: string };
  };
  menu?: { settingsGroup: { element: HTMLElement } };
  ui?: { menuContainer?: HTMLElement; autoQueueEnabled?: boolean; settings?: Partial<EventTarget> };
}

interface ComfyApi {
  queuePrompt: Queue;
  fetchApi(route: string, init?: RequestInit): Promise<Response>;
  addEventListener(type: string, listener: () => void): void;
}

type PromptExecutionErrorClass = new (response: { node_errors: object }, status?: number) => Error;

interface Window {
  comfyAPI?: { api?: { PromptExecutionError?: PromptExecutionErrorClass } };
}

declare module "*/scripts/app.js" {
  export const app: ComfyApp;
}

declare module "*/scripts/api.js" {
  export const api: ComfyApi;
  export const PromptExecutionError: PromptExecutionErrorClass | undefined;
}
