"""What the steps do on a GPU, here on the CPU: kernels interpreted, a device that is fake."""

import gzip
import json
import math
import pickle
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch
import triton

from emanet_triton.bench.case import Absent
from emanet_triton.bench.gpu_check import correct, meta, own, single, sweep, trace
from emanet_triton.bench.gpu_check.cases import EmCase
from emanet_triton.bench.gpu_check.conv_cases import case_of, with_dtype
from emanet_triton.bench.gpu_check.families import FAMILIES, SIZE, small_calls
from emanet_triton.bench.gpu_check.meta import Gpu
from emanet_triton.bench.machine import Machine
from emanet_triton.bench.measure import Lost, Watch, failed_row, measure
from emanet_triton.bench.method import Method
from emanet_triton.bench.rows import read_rows
from emanet_triton.bench.walk import walk
from emanet_triton.kernels import launch
from emanet_triton.kernels.conv import expand_reduce as conv_expand_reduce
from emanet_triton.kernels.conv import implicit_gemm as conv_triton
from emanet_triton.kernels.conv import tiles as conv_tiles
from emanet_triton.kernels.em import attention as em_attention
from emanet_triton.kernels.em import tiles as em_tiles

SM_90 = Gpu.of_arch("sm_90")
MACHINE = Machine(
    *("A GPU", None, "570", "2.11", "3.6", "abc", "2026-11-23"), 3e3, {"bf16": 800}, 0
)


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    """The steps measure on the CPU."""
    monkeypatch.setattr(own, "DEVICE", "cpu")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


class Dead(Watch):
    """After an error nothing runs."""

    def is_lost(self, error):
        return True


@pytest.fixture
def call():
    """A float16 convolution."""
    return with_dtype(small_calls()[0], torch.float16)


@pytest.fixture
def tiles():
    """Its shipped tile, and a smaller one."""
    shipped = conv_tiles.tile("conv_rows", "sm_90", "fp16", 64, 64, 1024)
    smaller = replace(shipped, meta={**shipped.meta, "BLOCK_O": 32}, pipeline_stages=2)
    names = sweep.tile_name(shipped) + own.SHIPPED, sweep.tile_name(smaller)
    return dict(zip(names, (shipped, smaller), strict=True))


@pytest.fixture
def pair():
    """Two float16 convolutions that one kernel computes."""
    (call,) = (call for call in small_calls() if call.name == "expand_reduce")
    return with_dtype(call, torch.float16)


@pytest.fixture
def pair_tiles():
    """Its shipped tile, and a smaller one."""
    shipped = conv_tiles.expand_reduce_tile("sm_90", "fp16", 64, 64)
    smaller = replace(shipped, meta={**shipped.meta, "BLOCK_O": 32}, pipeline_stages=2)
    names = sweep.tile_name(shipped) + own.SHIPPED, sweep.tile_name(smaller)
    return dict(zip(names, (shipped, smaller), strict=True))


def case_of_sweep(call, tiles):
    return sweep.make_case(sweep.Swept(case_of(call), 3), tiles, SM_90, "cpu")


def rows_of(call, tiles, watch=None):
    """The rows of a sweep of a convolution over tiles, measured here."""
    case = case_of_sweep(call, tiles)
    machine = replace(MACHINE, matmul_tflop_s={"fp16": 800})
    return measure(case, Method("cpu", rounds=1), machine, watch=watch)


def launched_blocks(module, monkeypatch):
    """Gets BLOCK_O of every launch of a module's kernels from now on."""
    found = []
    launch = module.launch

    def note(kernel, tile, *arguments, **constants):
        found.append(tile.meta["BLOCK_O"])
        launch(kernel, tile, *arguments, **constants)

    monkeypatch.setattr(module, "launch", note)
    return found


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch):
    """Kernels are interpreted here: none is compiled."""
    monkeypatch.setattr(sweep, "resources", lambda launch, gpu: "96 registers")


def test_a_tile_is_timed_and_held_against_the_floor(call, tiles, capsys):
    rows = rows_of(call, tiles)
    assert [row.provider for row in rows] == [*("128x64x64 w4 s4 shipped", "128x32x64 w4 s2")]
    assert {row.case for row in rows} == {
        "3x3 C=64 O=64 H=8 W=128 stride=1 dilation=1 relu B=1 fp16 uses=3"
    }
    for row in rows:
        assert row.gate == "passed"
        assert row.x_floor > 1
        assert row.tflop_s == pytest.approx(2 * 8 * 128 * 64 * 64 * 9 / row.p50_ms / 1e9)
    assert capsys.readouterr().out == 2 * "96 registers\n"


def test_the_tile_that_is_launched_is_the_provider_s(call, tiles, monkeypatch):
    launched = launched_blocks(conv_triton, monkeypatch)
    case = case_of_sweep(call, tiles)
    case.prepare()
    assert launched == [64]  # what all are held against
    case.providers["128x32x64 w4 s2"]()()
    assert set(launched[1:]) == {32}


def test_a_pair_of_convolutions_is_swept_as_one(pair, pair_tiles, monkeypatch):
    launched = launched_blocks(conv_expand_reduce, monkeypatch)
    rows = rows_of(pair, pair_tiles)
    assert [row.provider for row in rows] == ["128x64 w8 s3 shipped", "128x32 w8 s2"]
    assert [row.gate for row in rows] == ["passed", "passed"]
    assert {row.case for row in rows} == {"expand-reduce P=64 O=256 R=64 H=8 W=17 B=1 fp16 uses=3"}
    assert rows[1].tflop_s == pytest.approx(2 * 8 * 17 * 2 * 64 * 256 / rows[1].p50_ms / 1e9)
    assert set(launched) == {64, 32}


@pytest.mark.parametrize("added", [1, math.nan])
@pytest.mark.parametrize("output", [0, 1], ids=["expanded", "reduced"])
def test_a_pair_with_another_result_gets_no_time(pair, pair_tiles, monkeypatch, output, added):
    run = conv_expand_reduce.expand_reduce

    def off_by_one(*arguments):
        found = run(*arguments)
        if conv_tiles.expand_reduce_tile().pipeline_stages == 2:
            found[output].add_(added)
        return found

    case = case_of_sweep(pair, pair_tiles)
    case.prepare()
    monkeypatch.setattr(conv_expand_reduce, "expand_reduce", off_by_one)
    machine = replace(MACHINE, matmul_tflop_s={"fp16": 800})
    shipped, wrong = measure(case, Method("cpu", rounds=1), machine)
    assert shipped.gate == "passed"
    assert wrong.gate.startswith("failed: error")
    assert wrong.p50_ms is None


def test_the_sweep_takes_what_the_networks_launch():
    """The pairs run as pairs, so their convolutions are no cases of their own."""
    *swept, _, _, _, _ = sweep.dominant(False)
    names = [each.call.name for each in swept]
    assert names == [*["conv_bias_act"] * 4, *["expand_reduce"] * 3, "conv_bias_act"]
    uses = {each.call: each.uses for each in swept}
    whole = uses_of_pairs(["r50", "r101"], "whole")
    shared = {call: whole[call] for call in uses if call in whole}
    assert shared
    assert all(uses[call] == count for call, count in shared.items())
    expands = {(256, 1024), (128, 512), (64, 256)}  # these mostly run in pairs
    alone = [call for call in uses if call.name == "conv_bias_act"]
    assert all(tuple(call["weight"].shape[1::-1]) not in expands for call in alone)


def test_the_sweep_takes_the_kernels_of_the_block_that_the_networks_launch():
    *_, e_step, m_step, epilogue, project = sweep.dominant(False)
    found = {each.kernel: each.uses for each in (e_step, m_step, epilogue, project)}
    assert found == dict.fromkeys(sweep.EM_CANDIDATES, 2)
    calls = {call for network in ("r50", "r101") for call in walk(network, "whole", SIZE)}
    (block,) = (call for call in calls if call.name == "em_attention_block")
    assert block.but(backend="triton", precision="ieee") == e_step.call


@pytest.fixture
def block():
    """The E step of a float16 block, its shipped tile and a smaller one."""
    swept = sweep.Swept(EmCase("block", 2, (5, 9), 64, 16, dtype="fp16"), 2, "em_e_step")
    shipped = em_tiles.tile(swept.kernel, "sm_90", "fp16", 64, 16)
    smaller = replace(shipped, meta={**shipped.meta, "BLOCK_N": 32}, pipeline_stages=2)
    names = sweep.tile_name(shipped) + own.SHIPPED, sweep.tile_name(smaller)
    return swept, dict(zip(names, (shipped, smaller), strict=True))


def test_an_em_kernel_gets_the_tile_and_the_others_keep_theirs(block, monkeypatch):
    swept, tiles = block
    launched = {}
    launch = em_attention.launch

    def note(kernel, tile, *arguments, **constants):
        launched.setdefault(tile.kernel, set()).add(tile)
        launch(kernel, tile, *arguments, **constants)

    case = sweep.make_case(swept, tiles, SM_90, "cpu")
    case.prepare()
    monkeypatch.setattr(em_attention, "launch", note)
    case.providers["32x64 w4 s2"]()()
    assert launched.pop("em_e_step") == {tiles["32x64 w4 s2"]}
    for kernel in ("em_m_step", "em_project", "em_epilogue"):
        assert launched[kernel] == {em_tiles.tile(kernel, "sm_90", "fp16", 64, 16)}
    machine = replace(MACHINE, matmul_tflop_s={"fp16": 800})
    rows = measure(case, Method("cpu", rounds=1), machine)
    assert [(row.provider, row.gate) for row in rows] == [(name, "passed") for name in tiles]
    (name,) = {row.case for row in rows}
    assert name == "block B=2 C=64 K=16 H=5 W=9 fp16 channels-last em_e_step uses=2"


def test_an_em_kernel_with_another_result_gets_no_time(block, monkeypatch):
    swept, tiles = block
    case = sweep.make_case(swept, tiles, SM_90, "cpu")
    case.prepare()
    launch = em_attention.launch

    def doubled(kernel, tile, device, programs, *arguments, **constants):
        launch(kernel, tile, device, programs, *arguments, **constants)
        if tile.pipeline_stages == 2 and tile.kernel == "em_e_step":
            arguments[6].mul_(2)  # the sums of the responsibilities

    monkeypatch.setattr(em_attention, "launch", doubled)
    shipped, wrong = measure(case, Method("cpu", rounds=1), replace(MACHINE, matmul_tflop_s={}))
    assert shipped.gate == "passed"
    assert wrong.gate.startswith("failed: error")


def uses_of_pairs(networks, mode):
    found = Counter()
    for network in networks:
        for call, count in walk(network, mode, SIZE).items():
            if call.name == "expand_reduce" and meta.has_kernel(call):
                found[call.but(backend="triton")] += count
    return found


def test_a_tile_with_another_result_gets_no_time(call, tiles, monkeypatch):
    run = conv_triton.launch

    def off_by_one(kernel, tile, *arguments, **options):
        run(kernel, tile, *arguments, **options)
        if tile.pipeline_stages == 2:
            out = arguments[6]
            out.add_(1)

    monkeypatch.setattr(conv_triton, "launch", off_by_one)
    shipped, wrong = rows_of(call, tiles)
    assert shipped.gate == "passed"
    assert re.fullmatch(r"failed: error \S+ above 9\.8e-04", wrong.gate)
    assert wrong.p50_ms is None


def test_a_tile_that_was_refused_once_is_tried_again(call, tiles, monkeypatch):
    """Another shape may take it; a smaller tile must not run under its name."""
    asked = []

    class Kernel:
        def __getitem__(self, programs):
            return self.refuse

        def refuse(self, *arguments, num_stages, **options):
            asked.append(num_stages)
            raise triton.OutOfResources(300_000, 200_000, "shared memory")

    case = case_of_sweep(call, tiles)
    case.prepare()
    monkeypatch.setattr(launch, "_REPLACEMENTS", {})
    for kernel in ("conv_rows", "conv_pointers"):
        monkeypatch.setattr(conv_triton, kernel, Kernel())
    with pytest.warns(UserWarning, match="does not fit"):
        for _ in range(2):
            with pytest.raises(Absent, match=r"^it does not fit: out of resource"):
                case.providers["128x32x64 w4 s2"]()
    assert asked == [2, 2]


@pytest.mark.parametrize("dead", [False, True], ids=["goes on", "dead"])
def test_an_error_of_a_tile(call, tiles, monkeypatch, dead):
    run = conv_triton.launch

    def fail(kernel, tile, *arguments, **options):
        if tile.pipeline_stages == 2:
            raise RuntimeError("an illegal memory access\nand more")
        run(kernel, tile, *arguments, **options)

    monkeypatch.setattr(conv_triton, "launch", fail)
    if dead:
        with pytest.raises(Lost, match="an illegal memory access"):
            rows_of(call, tiles, Dead())
        return
    gates = [row.gate for row in rows_of(call, tiles)]
    assert gates == ["passed", "failed: RuntimeError: an illegal memory access"]


def test_a_sweep_writes_its_rows(tiles, monkeypatch, tmp_path):
    class Place:
        def __init__(self, selection, method, silence):
            self.selection = selection

        def machine(self, dtypes):
            return MACHINE

        def measure(self, cases, case, machine, found):
            names.extend(case.name for case in pickle.loads(pickle.dumps(cases))(self.selection))
            for provider in case.providers:
                found(replace(failed_row(case, provider, machine, "x"), host_us=9.0))

        def close(self):
            names.append("closed")

    names = []
    monkeypatch.setattr(sweep, "Elsewhere", Place)
    monkeypatch.setattr(sweep.Gpu, "here", lambda: SM_90)
    monkeypatch.setattr(sweep, "tiles_of", lambda swept, gpu, tiny: tiles)
    assert sweep.main(["--tiny", "--out", str(tmp_path)]) == 1
    rows = read_rows(tmp_path / own.SWEEP)
    assert [row.provider.endswith(own.SHIPPED) for row in rows] == 3 * [True, False]
    assert {row.host_us for row in rows} == {None}  # of the patches, not of the operator
    convolution, pair, block, *end = names
    cases = [convolution, pair, block]
    assert [row.case for row in rows] == [case for case in cases for _ in tiles]
    assert pair.startswith("expand-reduce P=64 O=256 R=64 ")
    assert block.endswith(" em_e_step uses=1")
    assert end == [*cases, *cases, "closed"]


def test_a_profiler_s_range_is_around_the_second_run(monkeypatch):
    done = []
    for name in ("start", "stop"):
        monkeypatch.setattr(torch.cuda.profiler, name, lambda name=name: done.append(name))

    class Case:
        name = "a case"

        def runner(self, device):
            return lambda: done.append(device)

    single._run(Case(), profiled=True)
    single._run(Case(), profiled=False)
    assert done == ["cpu", "start", "cpu", "stop", "cpu"]


def test_a_network_is_traced(tmp_path, monkeypatch):
    monkeypatch.setattr(trace, "Replay", lambda call: call)
    monkeypatch.setattr(trace, "TINY_SIZE", (24, 40))
    trace._trace("r50", "whole", True, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("r50_whole_eager.csv", "r50_whole_eager.json.gz"),
        *("r50_whole_replay.csv", "r50_whole_replay.json.gz"),
    ]
    content = json.loads(gzip.decompress((tmp_path / "r50_whole_eager.json.gz").read_bytes()))
    assert any("convolution" in event["name"] for event in content["traceEvents"])


def test_families_of_another_vendor():
    assert FAMILIES["cudnn"](Gpu.of_arch("gfx942"), True) == []
    assert FAMILIES["cudnn"](SM_90, True)


def test_the_family_of_cudnn_has_both_of_its_operators():
    residuals = {case.call["residual"] is not None for case in FAMILIES["cudnn"](SM_90, False)}
    assert residuals == {False, True}
    assert all(case.call["relu"] for case in FAMILIES["cudnn"](SM_90, False))


def test_a_gpu_is_named_as_triton_names_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 9))
    monkeypatch.setattr(meta, "gpu_arch", lambda device: "sm_80")
    gpu = Gpu.here()
    assert (gpu.arch, gpu.target.backend, gpu.target.arch) == ("sm_80", "cuda", 89)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(meta, "gpu_arch", lambda device: "gfx942")
    assert Gpu.here() == Gpu.of_arch("gfx942")


def test_cases_run_where_the_steps_measure(monkeypatch, tmp_path):
    monkeypatch.setattr(correct.Gpu, "here", lambda: SM_90)
    seen = []
    monkeypatch.setattr(correct, "run_families", lambda cases, device, found: seen.append(device))
    assert correct.main(["confusion", "--tiny", "--out", str(tmp_path)]) == 0
    assert seen == ["cpu"]
