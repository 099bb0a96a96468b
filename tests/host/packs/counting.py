"""A custom node for bench_instructions: callgrind counts from the moment the worker takes a prompt out of the queue to the
moment it hands the result in.

Under valgrind a node takes 50 times as long, and would no longer count as a short one: here nearly every node does.
"""

import ctypes
import os
import sys

import execution

CALLGRIND = ctypes.PyDLL(os.environ["CALLGRIND_REQUESTS"])
LONG_S = 1e6


def counted_get(original):
    def get(*args, **kwargs):
        item = original(*args, **kwargs)
        if item is not None:
            for name, module in list(sys.modules.items()):
                if name.endswith("nodes.host.execution"):
                    vars(module)["SHORT_S"] = LONG_S
            CALLGRIND.start()
            CALLGRIND.zero()
        return item

    return get


def counted_done(original):
    def task_done(self, item_id, *args, **kwargs):
        CALLGRIND.dump(str(self.currently_running[item_id][1]).encode())
        return original(self, item_id, *args, **kwargs)

    return task_done


execution.PromptQueue.get = counted_get(execution.PromptQueue.get)
execution.PromptQueue.task_done = counted_done(execution.PromptQueue.task_done)
NODE_CLASS_MAPPINGS = {}
