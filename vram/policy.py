"""What may become of each part of a video pipeline when its memory is wanted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

from .components import ComponentRole


@dataclass(frozen=True, slots=True)
class VideoComponentPolicy:
    """One component's rule. Contradictions raise ValueError."""

    pin_to_gpu: bool = False
    """Stays on the card until the last rung of recovery."""
    offload_when_idle: bool = False
    """Leaves as soon as its pipeline is idle."""
    offload_between_uses: bool = False
    """Leaves between prompts even while its pipeline is active, and comes back when it is asked for."""
    priority: int = 0
    """Of the components that may leave, the lowest leaves first."""
    host_decides: bool = False
    """Its host places it; nothing here moves it unasked."""

    @property
    def words(self) -> str:
        """What becomes of the component, for a person."""
        if self.host_decides:
            return "the host decides"
        if self.pin_to_gpu:
            return "pinned"
        if self.offload_between_uses:
            return "leaves between uses"
        return "leaves when idle" if self.offload_when_idle else "stays until memory is wanted"

    def __post_init__(self) -> None:
        leaves = self.offload_when_idle or self.offload_between_uses
        if self.pin_to_gpu and leaves:
            raise ValueError("a component can't be pinned to the card and leave it when idle or between uses")
        if self.host_decides and (self.pin_to_gpu or leaves):
            raise ValueError("where the host decides nothing else can be asked of a component")


HOST_DECIDES: Final = VideoComponentPolicy(host_decides=True)

DEFAULT_VIDEO_COMPONENT_POLICIES: Final[Mapping[ComponentRole, VideoComponentPolicy]] = MappingProxyType(
    {
        # 0.24 GiB that every prompt needs at its end: moving it frees next to nothing
        ComponentRole.VAE: VideoComponentPolicy(pin_to_gpu=True, priority=3),
        # 6.3 GiB in fp8, used only at the start of a prompt
        ComponentRole.TEXT_ENCODER: VideoComponentPolicy(offload_when_idle=True, offload_between_uses=True, priority=0),
        ComponentRole.GENERATOR: VideoComponentPolicy(offload_when_idle=True, priority=2),
        ComponentRole.CLIP_VISION: VideoComponentPolicy(offload_when_idle=True, offload_between_uses=True, priority=0),
        ComponentRole.OTHER: VideoComponentPolicy(priority=1),
    }
)
"""VAE pinned, encoders leave between prompts, the generator leaves when the pipeline is idle. Sizes: exact parameter counts of
UMT5-XXL and the WAN 2.1 VAE."""


PersonsWord = Literal["pin", "unpin"]
"""What a person says of a model in the panel, whatever a node or its loader says."""


def under_word(rule: VideoComponentPolicy, word: PersonsWord | None, elastic: bool) -> VideoComponentPolicy:
    """The policy that holds where `rule` would, and a person has said so."""
    if word == "pin" and not rule.pin_to_gpu:
        return VideoComponentPolicy(pin_to_gpu=True, priority=rule.priority)
    if word == "unpin" and rule.pin_to_gpu:
        return HOST_DECIDES if elastic else VideoComponentPolicy(priority=rule.priority)
    return rule


def hosted_policy(role: ComponentRole, elastic: bool) -> VideoComponentPolicy:
    """The policy of a model that a host with a model management of its own keeps on the card on purpose.

    Such a host makes room by itself when memory is wanted, so nothing leaves before that; who goes first is still told. Elastic
    weights are the host's own affair.
    """
    if elastic:
        return HOST_DECIDES
    return VideoComponentPolicy(priority=DEFAULT_VIDEO_COMPONENT_POLICIES[role].priority)


def default_policy(role: ComponentRole, elastic: bool) -> VideoComponentPolicy:
    """The policy of a component nobody set one for. Elastic weights are the host's own affair."""
    return HOST_DECIDES if elastic else DEFAULT_VIDEO_COMPONENT_POLICIES[role]


ROLE_RULE: Final = "recommended for its role"

CHOICES: Final[Mapping[str, VideoComponentPolicy]] = MappingProxyType(
    {
        "stays until memory is wanted": VideoComponentPolicy(),
        "pinned to the card": VideoComponentPolicy(pin_to_gpu=True),
        "leaves when idle": VideoComponentPolicy(offload_when_idle=True),
        "leaves between uses": VideoComponentPolicy(offload_when_idle=True, offload_between_uses=True),
        "ComfyUI decides": HOST_DECIDES,
    }
)
"""What a person chooses from beside ROLE_RULE, and the policy it stands for."""


def chosen_policy(choice: str, role: ComponentRole) -> VideoComponentPolicy | None:
    """The policy that a person's choice means for a component of this role; None for no such choice."""
    return DEFAULT_VIDEO_COMPONENT_POLICIES[role] if choice == ROLE_RULE else CHOICES.get(choice)
