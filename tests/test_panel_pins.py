"""A person's word in the panel on what is pinned, against policy nodes, loaders and the default of a role."""

import pytest
from test_offloader import PaperHandle
from vram_headroom.vram.components import ComponentRole
from vram_headroom.vram.offloader import VRAMOffloader
from vram_headroom.vram.policy import HOST_DECIDES, VideoComponentPolicy

STAYS, PINNED, LEAVES = (
    VideoComponentPolicy(),
    VideoComponentPolicy(pin_to_gpu=True),
    VideoComponentPolicy(offload_when_idle=True),
)


def offloader_with(handle: PaperHandle, policy: VideoComponentPolicy = STAYS) -> VRAMOffloader:
    offloader = VRAMOffloader()
    register(offloader, handle, policy)
    return offloader


def register(offloader: VRAMOffloader, handle: PaperHandle, policy: VideoComponentPolicy = STAYS) -> None:
    offloader.register("wan", "dit", ComponentRole.GENERATOR, handle, "1", policy)


def test_a_pin_from_the_panel_survives_policy_nodes_and_a_second_load() -> None:
    handle = PaperHandle(7)
    offloader = offloader_with(handle)
    assert offloader.set_pin(7, True)
    # its node rules as each prompt starts, then is gone, then the loader runs again
    offloader.set_policy(7, LEAVES, "50")
    assert offloader.pinned_keys() == {7}
    offloader.set_policy(7, None)
    assert offloader.pinned_keys() == {7}
    register(offloader, handle)
    assert offloader.pinned_keys() == {7}


def test_after_unpinning_what_was_ruled_meanwhile_holds() -> None:
    offloader = offloader_with(PaperHandle(7))
    offloader.set_pin(7, True)
    offloader.set_policy(7, LEAVES, "50")
    offloader.set_pin(7, False)
    assert offloader.policy_of(7) == LEAVES
    offloader.set_policy(7, None)
    assert offloader.policy_of(7) == STAYS


def test_unpinning_takes_off_the_pin_of_a_policy_node_each_time_it_rules() -> None:
    offloader = offloader_with(PaperHandle(7))
    offloader.set_policy(7, PINNED, "50")
    offloader.set_pin(7, False)
    assert (offloader.pinned_keys(), offloader.policy_of(7)) == (frozenset(), STAYS)
    offloader.set_policy(7, PINNED, "50")
    assert offloader.pinned_keys() == frozenset()
    offloader.set_policy(7, LEAVES, "50")
    assert offloader.policy_of(7) == LEAVES, "its other rules hold"
    offloader.set_pin(7, True)
    offloader.set_policy(7, None)
    assert offloader.pinned_keys() == {7}


def test_an_elastic_model_that_is_unpinned_is_the_hosts_affair_again() -> None:
    offloader = offloader_with(PaperHandle(7, elastic=True), HOST_DECIDES)
    offloader.set_policy(7, PINNED, "50")
    offloader.set_pin(7, False)
    assert offloader.policy_of(7) == HOST_DECIDES
    offloader.set_pin(7, True)
    assert offloader.pinned_keys() == {7}


def test_a_pin_goes_with_its_model() -> None:
    handle = PaperHandle(7)
    offloader = offloader_with(handle)
    offloader.set_pin(7, True)
    handle.alive = False
    # another model may have the key of one that is gone
    register(offloader, PaperHandle(7))
    assert offloader.pinned_keys() == frozenset()
    assert not offloader.set_pin(8, True)


@pytest.mark.parametrize("pinned", [True, False])
def test_every_change_of_a_pin_is_a_new_revision(pinned: bool) -> None:
    offloader = offloader_with(PaperHandle(7), PINNED if not pinned else STAYS)
    before = offloader.revision
    offloader.set_pin(7, pinned)
    assert offloader.revision > before
