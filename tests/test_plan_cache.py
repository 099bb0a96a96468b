"""What is kept of earlier plans: given again only while nothing it was made of has changed, and never without bound."""

import os
from pathlib import Path

import planlab
import pytest
from vram_headroom.vram.estimate.checkpoint import Checkpoint
from vram_headroom.vram.plan.cache import Bounded, ChainCache, PlanStore, Reads, content_key
from vram_headroom.vram.plan.types import Chain, MediaSize, MissingFileError


class Folder:
    """Model files on a real disk, with a header that depends on their length."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def find(self, folder: str, name: str) -> str | None:
        path = self.root / folder / name
        return str(path) if path.is_file() else None

    def header(self, folder: str, name: str) -> Checkpoint:
        path = self.find(folder, name)
        if path is None:
            raise MissingFileError(f"{name} is not in models/{folder}")
        return planlab.checkpoint(path, ("w", "F16", (os.path.getsize(path),)))

    def put(self, folder: str, name: str, content: bytes) -> Path:
        path = self.root / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path


def reads_of(folder: Folder) -> Reads:
    return Reads(folder.header, lambda name: MediaSize(8, 8, 1), lambda name: str(folder.root / "input" / name))


def test_a_chain_is_given_again_until_a_file_it_read_changes(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    path = folder.put("vae", "a.safetensors", b"1234")
    cache, reads, chain = ChainCache(folder.find), reads_of(folder), Chain((), ())
    reads.header("vae", "a.safetensors")
    cache.put("k", chain, reads)
    assert cache.get("k") is chain
    assert cache.get("other") is None
    path.write_bytes(b"12345")
    assert cache.get("k") is None
    path.unlink()
    assert cache.get("k") is None


def test_a_file_that_was_missing_and_has_come_makes_it_stale(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    cache, reads, chain = ChainCache(folder.find), reads_of(folder), Chain((), ())
    with pytest.raises(MissingFileError):
        reads.header("loras", "new.safetensors")
    cache.put("k", chain, reads)
    assert cache.get("k") is chain
    folder.put("loras", "new.safetensors", b"1")
    assert cache.get("k") is None


def test_an_input_picture_that_comes_or_goes_makes_it_stale(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    cache, reads, chain = ChainCache(folder.find), reads_of(folder), Chain((), ())
    assert reads.size("a.png") == MediaSize(8, 8, 1)
    cache.put("k", chain, reads)
    assert cache.get("k") is chain
    folder.put("input", "a.png", b"1")
    assert cache.get("k") is None


def test_what_is_kept_is_bounded_and_the_last_used_stay() -> None:
    kept: Bounded[int] = Bounded(2)
    kept.put("a", 1)
    kept.put("b", 2)
    assert kept.get("a") == 1
    kept.put("c", 3)
    assert [kept.get(key) for key in "abc"] == [1, None, 3]
    assert (kept.pop("a"), kept.pop("a"), len(kept)) == (1, None, 1)
    store = PlanStore(size=1)
    assert store.get("nobody") is None


def test_a_key_is_equal_for_equal_content_only() -> None:
    prompt = planlab.two_experts()
    assert content_key(prompt, 1) == content_key(planlab.two_experts(), 1)
    assert content_key(prompt, 1) != content_key(prompt, 2)
    assert content_key(prompt) != content_key(planlab.two_experts(length=77))
    with pytest.raises(ValueError, match="prompt is no JSON"):
        content_key({"a": {1, 2}})
