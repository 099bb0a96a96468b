"""The tracer counts what tensors really use: against torch's own record of CPU memory, and law by law."""

import copy
import gc
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tinywan
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import _get_current_function_mode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import _get_current_dispatch_mode
from vram_headroom.vram.allocator import replay
from vram_headroom.vram.trace import Alive, Trace, TraceOptions, trace_forward

KIB = 1024
AS_ON_CPU = TraceOptions(attention="native", fused_rms_norm=False)
"""What the CPU runs too, so that its memory can be compared."""
ON_CPU = TraceOptions(attention="native", fused_rms_norm=False, device="cpu")


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def kib(*sizes: int) -> torch.Tensor:
    """A tensor on meta of so many KiB."""
    return meta(*sizes, 256)


def on_meta(module: nn.Module) -> Any:
    """A copy without values."""
    return copy.deepcopy(module).to("meta")


def in_convolution(node: Any) -> Any:
    """The outermost convolution that a profiled event lies in, None where it lies in none."""
    found = None
    while node is not None:
        found = node if node.name == "aten::convolution" else found
        node = node.parent
    return found


def events(node: Any) -> Iterator[Any]:
    if node.tag.name == "Allocation":
        yield node
    for child in node.children:
        yield from events(child)


def measured(forward: Callable[[], object]) -> int:
    """Peak of CPU memory that the profiler saw torch's allocator hand out, without the scratch memory of CPU convolutions."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        forward()
        gc.collect()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, record_shapes=True) as profiled:
            kept = forward()
    assert profiled.profiler is not None
    results = profiled.profiler.kineto_results
    assert results is not None
    seen = sorted((e for root in results.experimental_event_tree() for e in events(root)), key=lambda e: e.start_time_ns)
    scratch: set[int] = set()
    made: dict[int, int] = {}
    for index, event in enumerate(seen):
        pointer, size = event.extra_fields.ptr, event.extra_fields.alloc_size
        if size > 0:
            made[pointer] = index
        elif pointer in made:
            first = made.pop(pointer)
            where = in_convolution(event)
            if where is not None and in_convolution(seen[first]) == where:
                scratch |= {first, index}
    now = peak = 0
    for index, event in enumerate(seen):
        if index not in scratch:
            now += event.extra_fields.alloc_size
            peak = max(peak, now)
    del kept
    return peak


class Attention(nn.Module):
    """q, k and v of one layer, with torch's chain for the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-1, -2)).mul_(0.3).softmax(-1)
        return (scores @ v).transpose(1, 2).flatten(2) + x


SMALL: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "feed forward": (lambda: nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)), (8, 33, 64)),
    "layer norm": (lambda: nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64), nn.LayerNorm(64)), (8, 33, 64)),
    "rms norm": (lambda: nn.Sequential(nn.RMSNorm(64), nn.SiLU(), nn.RMSNorm(64)), (8, 33, 64)),
    "attention": (Attention, (2, 65, 32)),
    "convolutions": (
        lambda: nn.Sequential(nn.Conv2d(4, 16, 3, padding=1), nn.SiLU(), nn.Conv2d(16, 4, 3, stride=2)),
        (1, 4, 16, 16),
    ),
    "video convolutions": (
        lambda: nn.Sequential(nn.Conv3d(4, 16, 3, padding=1), nn.SiLU(inplace=True), nn.Conv3d(16, 4, 3, padding=1)),
        (1, 4, 5, 16, 16),
    ),
}


@pytest.mark.parametrize("name", SMALL)
def test_the_peak_is_what_torch_hands_out_on_the_cpu(name: str) -> None:
    make, shape = SMALL[name]
    torch.manual_seed(0)
    module, given = make().eval(), torch.randn(shape)
    real = measured(lambda: module(given))
    assert real > 0
    assert trace_forward(lambda: module(given), options=ON_CPU).peak_bytes == real
    elsewhere, unreal = on_meta(module), given.to("meta")
    assert trace_forward(lambda: elsewhere(unreal), options=AS_ON_CPU).peak_bytes == real


def wan_forward(model: nn.Module, device: str) -> Callable[[], object]:
    video = torch.ones((1, 16, 2, 4, 4), device=device)
    step = torch.tensor([5], device=device)
    text = torch.ones((1, 7, tinywan.TEXT_WIDTH), device=device)
    return lambda: model(video, step, text, return_dict=False)


def test_the_peak_of_the_diffusers_wan_transformer_is_what_torch_hands_out_on_the_cpu() -> None:
    model = tinywan.generator()
    real = measured(wan_forward(model, "cpu"))
    traced = trace_forward(wan_forward(on_meta(model), "meta"), options=AS_ON_CPU)
    assert traced.peak_bytes == real > 9_000
    assert traced.output_bytes == 16 * 2 * 4 * 4 * 4
    assert traced.kept_bytes == 0


@pytest.mark.parametrize("way", ["decode", "encode"])
def test_the_peak_of_the_diffusers_wan_vae_is_what_torch_hands_out_on_the_cpu(way: str) -> None:
    vae = tinywan.vae()
    given = torch.ones((1, 16, 3, 4, 4) if way == "decode" else (1, 3, 9, 32, 32))
    real = measured(lambda: getattr(vae, way)(given, return_dict=False))
    elsewhere, unreal = on_meta(vae), given.to("meta")
    assert trace_forward(lambda: getattr(elsewhere, way)(unreal, return_dict=False), options=AS_ON_CPU).peak_bytes == real
    assert real > 100_000


def test_more_layers_of_the_same_kind_do_not_change_the_peak() -> None:
    def peak(layers: int) -> int:
        block = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)).to("meta")
        model, given = nn.Sequential(*(copy.deepcopy(block) for _ in range(layers))), meta(9, 64)
        return trace_forward(lambda: model(given)).peak_bytes

    assert peak(4) == peak(40)


def test_a_storage_counts_until_nothing_refers_to_it() -> None:
    def forward() -> torch.Tensor:
        a = kib(1).sin()  # 1 for what sin is given, until it has returned
        b = a.cos()
        del a
        return b.cos()

    traced = trace_forward(forward)
    assert traced.peak_bytes == 2 * KIB
    assert traced.output_bytes == KIB
    assert traced.kept_bytes == 0
    assert [event.bytes // KIB for event in traced.events] == [1, 1, -1, 1, -1, 1, -1, -1]


def test_inputs_and_weights_are_not_counted_nor_are_views_of_them() -> None:
    given, layer = kib(4), nn.Linear(256, 256, device="meta")
    traced = trace_forward(lambda: (given[1:], layer.weight.t(), given.add_(1), layer.weight.detach().view(-1)))
    assert traced == Trace(0, 0, 0, (), -1)


def test_views_aliases_and_in_place_operations_add_nothing() -> None:
    def forward() -> list[torch.Tensor]:
        a = kib(8)
        parts = [a.view(-1), a.t(), *a.chunk(4), a.expand(3, 8, 256), a.detach(), a.unsqueeze(0), a.reshape(4, 512)]
        a.mul_(2).add_(1)
        a[2:4] = 0
        a.copy_(a.flip(0))
        return parts

    traced = trace_forward(forward)
    assert traced.peak_bytes == 16 * KIB  # a, and the flipped copy of it
    assert traced.output_bytes == 8 * KIB


def test_a_storage_that_grows_is_counted_anew() -> None:
    def forward() -> torch.Tensor:
        return torch.cat([kib(2), kib(2)], out=kib(0))

    assert trace_forward(forward).output_bytes == 4 * KIB


def test_an_operation_that_is_repeated_is_counted_again_with_arguments_of_its_own_kind() -> None:
    given, flags = meta(256, 4, dtype=torch.int32), meta(256, 4, dtype=torch.bool)

    def forward() -> list[torch.Tensor]:
        twice = [given + 1 for _ in range(2)]
        # equal numbers of other types make results of other types
        others = [given + 1.0, flags + True, flags + 1, given.to(torch.float64), given.to(torch.float16)]
        turned = given.t().contiguous()
        return [*twice, *others, turned, given.t() + 1, given[:, :2] + 1]

    trace = trace_forward(forward)
    sizes = [event.bytes for event in trace.events if event.bytes > 0]
    assert sizes == [4096, 4096, 4096, 1024, 8192, 8192, 2048, 4096, 4096, 2048]
    assert trace.output_bytes == trace.peak_bytes == sum(sizes)


def test_caches_that_a_forward_leaves_behind_are_told_apart_from_its_output() -> None:
    caches: list[torch.Tensor] = []

    def forward() -> torch.Tensor:
        caches.append(kib(3))
        return kib(5)

    traced = trace_forward(forward)
    assert (traced.peak_bytes, traced.output_bytes, traced.kept_bytes) == (8 * KIB, 5 * KIB, 3 * KIB)


def test_constants_made_of_numbers_are_counted_and_other_devices_are_not() -> None:
    def forward() -> tuple[torch.Tensor, ...]:
        return torch.tensor([1.0, 2.0], device="meta"), torch.zeros(9), torch.tensor([1.0])

    assert trace_forward(forward).peak_bytes == 8
    assert trace_forward(forward, options=ON_CPU).peak_bytes == 9 * 4 + 4


def test_the_peak_is_told_with_what_made_it() -> None:
    layer = nn.Linear(256, 512, device="meta", dtype=torch.float16)
    given = meta(2, 256, dtype=torch.float16)
    traced = trace_forward(lambda: torch.nn.functional.gelu(layer(given)))
    assert traced.at_peak() == (
        Alive("aten::addmm", (2, 512), "float16", 2 * KIB),
        Alive("aten::gelu", (2, 512), "float16", 2 * KIB),
    )
    assert traced.peak_by_op() == (("aten::addmm", 2 * KIB), ("aten::gelu", 2 * KIB))
    assert replay(traced.requests()).requested == traced.peak_bytes


def test_flash_attention_makes_its_output_and_the_log_sum_exp_and_joins_the_heads_for_nothing() -> None:
    q = meta(2, 4, 100, 16, dtype=torch.float16)
    k = meta(2, 4, 300, 16, dtype=torch.float16)

    def forward() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, k).transpose(1, 2).reshape(2, 100, 64)

    output, sums = 2 * 4 * 100 * 16 * 2, 2 * 4 * 100 * 4
    assert trace_forward(forward).peak_bytes == output + sums
    assert trace_forward(forward, options=TraceOptions(attention="math")).peak_bytes > 2 * 4 * 100 * 300 * 4
    math = trace_forward(forward, options=TraceOptions(attention="math"))
    assert math.peak_bytes == trace_forward(forward, options=AS_ON_CPU).peak_bytes
    assert math.output_bytes == output


def test_a_fused_rms_norm_makes_its_output_only() -> None:
    given, norm = meta(10, 256, dtype=torch.float16), nn.RMSNorm(256, device="meta", dtype=torch.float16)
    for call in (lambda: norm(given), lambda: torch.rms_norm(given, [256]), lambda: torch.nn.functional.rms_norm(given, [256])):
        assert trace_forward(call).peak_bytes == 10 * 256 * 2
        assert trace_forward(call, options=TraceOptions(fused_rms_norm=False)).peak_bytes >= 2 * 10 * 256 * 4


@torch.library.custom_op("vram_headroom_test::turn", mutates_args=())
def turn(x: torch.Tensor, by: float) -> torch.Tensor:
    return chain_of_turn(x, by)


@turn.register_fake
def _(x: torch.Tensor, by: float) -> torch.Tensor:
    return torch.empty_like(x)


def chain_of_turn(x: torch.Tensor, by: float) -> torch.Tensor:
    return (x.float() * by).to(x.dtype)


def test_a_custom_operation_is_one_kernel_or_the_chain_that_is_named_for_it() -> None:
    given = meta(256, dtype=torch.float16)

    def forward() -> torch.Tensor:
        return torch.ops.vram_headroom_test.turn(given, 2.0)

    assert trace_forward(forward).peak_bytes == 512
    chain = TraceOptions(instead={"vram_headroom_test::turn": chain_of_turn})
    assert trace_forward(forward, options=chain).peak_bytes == 2 * KIB
    assert trace_forward(forward, options=chain).output_bytes == 512


def test_a_workspace_of_a_convolution_is_a_copy_of_what_goes_in_and_out() -> None:
    layer, given = nn.Conv3d(4, 8, 3, padding=1, device="meta"), meta(1, 4, 2, 8, 8)
    assert trace_forward(lambda: layer(given)).peak_bytes == 8 * 128 * 4
    copies = trace_forward(lambda: layer(given), options=TraceOptions(convolution_workspace="copies"))
    assert copies.peak_bytes == 8 * 128 * 4 + (4 + 8) * 128 * 4
    assert copies.output_bytes == 8 * 128 * 4


def test_a_wrapper_around_tensors_is_counted_by_what_it_holds() -> None:
    two_tensor = pytest.importorskip("torch.testing._internal.two_tensor")
    a, b = meta(256), meta(256)

    def forward() -> object:
        return two_tensor.TwoTensor(a, b) * 2

    assert trace_forward(forward).peak_bytes == 2 * KIB


def test_an_error_in_the_forward_is_raised_and_leaves_no_mode_active() -> None:
    def forward() -> None:
        kib(1)
        raise RuntimeError("out of cheese")

    with pytest.raises(RuntimeError, match="out of cheese"):
        trace_forward(forward)
    assert _get_current_dispatch_mode() is None
    assert _get_current_function_mode() is None
    assert torch.nn.functional.rms_norm(torch.full((4,), 3.0), (4,)).tolist() == pytest.approx([1.0] * 4)
    assert torch.is_grad_enabled()


def test_inference_mode_around_a_trace_hides_nothing() -> None:
    layer, given = nn.Linear(256, 256, device="meta"), meta(2, 3, 256)
    norm = nn.RMSNorm(256, device="meta")
    open_air = trace_forward(lambda: norm(layer(given)), options=AS_ON_CPU)
    with torch.inference_mode():
        inside = trace_forward(lambda: norm(layer(given)), options=AS_ON_CPU)
        assert torch.is_inference_mode_enabled()
    assert inside == open_air
    assert inside.peak_bytes >= 3 * 6 * KIB


def test_a_trace_counts_its_own_thread_only() -> None:
    started, done = threading.Event(), threading.Event()
    seen: list[object] = []

    def stranger() -> None:
        started.wait(10)
        held = kib(1000)
        seen.append((held.sin().shape, _get_current_dispatch_mode(), _get_current_function_mode()))
        seen.append(trace_forward(lambda: kib(7)).peak_bytes)
        done.set()

    def forward() -> torch.Tensor:
        a = kib(2)
        started.set()
        assert done.wait(10)
        return a.sin()

    thread = threading.Thread(target=stranger)
    thread.start()
    traced = trace_forward(forward)
    thread.join()
    assert traced.peak_bytes == 4 * KIB
    assert seen == [((1000, 256), None, None), 7 * KIB]


def test_a_trace_inside_a_trace_counts_for_both() -> None:
    inner: list[Trace] = []

    def forward() -> torch.Tensor:
        a = kib(1)
        inner.append(trace_forward(lambda: a.sin().cos()))
        return a

    assert trace_forward(forward).peak_bytes == 3 * KIB
    assert inner[0].peak_bytes == 2 * KIB


def recorded(version: str) -> dict[tuple[Any, ...], dict[str, Any]]:
    """The recorded rows of a ComfyUI, by what they are about."""
    stored = json.loads((Path(__file__).parent / "data" / f"traces-{version}.json").read_text(encoding="utf-8"))
    rows = [dict(zip(stored["columns"], row, strict=True)) for row in stored["rows"]]
    return {tuple(row.values())[:10]: row for row in rows}


@pytest.mark.parametrize("version", ["0.8", "0.33"])
def test_the_recorded_peak_of_four_blocks_is_that_of_all(version: str) -> None:
    rows = recorded(version)
    full = [key for key in rows if key[0] == "dit-full"]
    assert len({key[1] for key in full}) >= 16
    assert [key for key in full if rows[key]["peak_bytes"] != rows[("dit", *key[1:])]["peak_bytes"]] == []


@pytest.mark.parametrize(("version", "fused", "eager"), [("0.8", 2728, 3240), ("0.33", 3048, 3240)])
def test_the_recorded_peaks_are_those_that_another_tracer_found(version: str, fused: int, eager: int) -> None:
    """MiB of a 14B at 480x832 and 81 frames, with fused kernels and with a chain for RoPE."""
    rows = recorded(version)
    for rope, expected in ((True, fused), (False, eager)):
        row = rows["dit", "t2v-14b", "fp16", rope, True, None, 1, 81, 480, 832]
        assert row["peak_bytes"] >> 20 == expected
        assert row["tokens"] == 32760
