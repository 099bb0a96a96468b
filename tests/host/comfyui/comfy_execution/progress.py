"""How far each node of the running prompt is, sent to the browser as `progress_state`."""

from typing import Any

from .graph import DynamicPrompt


class ProgressRegistry:
    def __init__(self, prompt_id: str, dynprompt: DynamicPrompt, server: Any) -> None:
        self.prompt_id = prompt_id
        self.dynprompt = dynprompt
        self.nodes: dict[str, dict[str, Any]] = {}
        self._server = server

    def start_progress(self, node_id: str) -> None:
        self._set(node_id, "running", 0.0, 1.0)

    def update_progress(self, node_id: str, value: float, max_value: float, image: Any = None) -> None:
        self._set(node_id, "running", value, max_value)

    def finish_progress(self, node_id: str) -> None:
        most = self.nodes.get(node_id, {}).get("max", 1)
        self._set(node_id, "finished", most, most)

    def _set(self, node_id: str, state: str, value: float, most: float) -> None:
        self.nodes[node_id] = {"value": value, "max": most, "state": state}
        if self._server is None:
            return
        sent = {
            one: {
                **entry,
                "node_id": one,
                "prompt_id": self.prompt_id,
                "display_node_id": self.dynprompt.get_display_node_id(one),
                "parent_node_id": self.dynprompt.get_parent_node_id(one),
                "real_node_id": self.dynprompt.get_real_node_id(one),
            }
            for one, entry in self.nodes.items()
        }
        self._server.send_sync("progress_state", {"prompt_id": self.prompt_id, "nodes": sent}, self._server.client_id)


_registry = ProgressRegistry("", DynamicPrompt({}), None)


def reset_progress_state(prompt_id: str, dynprompt: DynamicPrompt, server: Any = None) -> None:
    global _registry
    _registry = ProgressRegistry(prompt_id, dynprompt, server)


def get_progress_state() -> ProgressRegistry:
    return _registry
