"""A custom node for tests that wraps what this pack wraps, as other packs do: each call is counted and handed on."""

from collections import Counter

import comfy.model_management as model_management
import comfy.sd
import execution

CALLS = Counter()


def counted(owner, name):
    original = getattr(owner, name)

    def wrapper(*args, **kwargs):
        CALLS[name] += 1
        return original(*args, **kwargs)

    setattr(owner, name, wrapper)


def counted_async(owner, name):
    original = getattr(owner, name)

    async def wrapper(*args, **kwargs):
        CALLS[name] += 1
        return await original(*args, **kwargs)

    setattr(owner, name, wrapper)


counted_async(execution, "get_output_data")
counted(execution.PromptExecutor, "execute")
counted(execution.PromptQueue, "get_flags")
counted(model_management, "free_memory")
counted(model_management, "load_models_gpu")
counted(comfy.sd.VAE, "decode_tiled_3d")

NODE_CLASS_MAPPINGS = {}
