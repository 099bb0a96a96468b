"""Names of what recoverylab.py samples, for tests outside of the stand-in."""

CASES = (
    "plain",
    "cond and uncond apart",
    "alone on the card",
    "ancestral",
    "EasyCache",
    "LazyCache",
    "LoRA",
    "LoRA alone on the card",
    "context windows",
    "CausalAR",
    "harmless",
)
FOREIGN = (
    "apply_model",
    "diffusion_model",
    "model function",
    "patch",
    "attention",
    "options",
    "injection",
    "replaced forward",
    "hooks",
    "CUDA graphs",
)
"""What another pack may have put around or into a model."""
