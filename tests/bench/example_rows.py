"""Rows of a machine that does not exist, for the tests of the report."""

from dataclasses import replace

from emanet_triton.bench.rows import Row

CPU = {"device": "Example CPU, 2 cores", "threads": 2, "copy_gb_s": 20.0, "noise": 0.02}
GPU = {"device": "Example G100", "driver": "570.1", "copy_gb_s": 3000.0, "noise": 0.01}
MATMUL = {"fp32": 2.0, "bf16": 4.0}


def row(suite, case, provider, ms, ratio=1.0, dtype="fp32", **columns):
    """A row that passed. p20 and p80 are 5% from ``ms``, and 10% from ``ratio``."""
    spread = 0.0 if ratio == 1.0 else 0.1 * ratio
    versions = {"torch": "2.11", "triton": "3.6", "commit": "abc1234", "date": "2026-01-02"}
    times = {"p20_ms": 0.95 * ms, "p50_ms": ms, "p80_ms": 1.05 * ms, "rounds": 15}
    ratios = {"ratio": ratio, "ratio_p20": ratio - spread, "ratio_p80": ratio + spread}
    rate = {"matmul_tflop_s": MATMUL[dtype], "clock": "wall"}
    return Row(
        *(suite, case, provider, "passed"),
        dtype=dtype,
        **(versions | CPU | times | ratios | rate | columns),
    )


def without_times(item, provider, gate):
    """The row of another provider at the same case, which did not run."""
    names = ("p20_ms", "p50_ms", "p80_ms", "rounds", "ratio", "ratio_p20", "ratio_p80", "peak_mb")
    columns = dict.fromkeys((*names, "cold_ms", "host_us"))
    return replace(item, provider=provider, gate=gate, clock="", **columns)


def with_floor(item, floor_ms, flop_per_byte):
    """The row with a floor of ``flop_per_byte``, whose bytes move at the copy's rate."""
    speed = floor_ms / item.p50_ms
    bandwidth = item.copy_gb_s * speed
    return replace(
        item,
        floor_ms=floor_ms,
        x_floor=1 / speed,
        gb_s=bandwidth,
        tflop_s=bandwidth * flop_per_byte / 1e3,
    )


def cpu_rows():
    """All suites on a CPU, and one that the benchmark no longer has."""
    rows = []
    for positions, ms in ((8192, 600.0), (32768, 2800.0)):
        case = f"block B=1 N={positions} fp32 nchw"
        for provider, ratio in (("mmseg", 1.0), ("mmseg-compiled", 1.2), ("ours-torch", 1.7)):
            rows.append(with_floor(row("em", case, provider, ms / ratio, ratio), ms / 4, 90.0))
    for channels in range(64, 64 * 14, 64):
        layer = f"3x3 C={channels} O=64 H=64 W=128 stride=1 dilation=1 relu B=1 fp32"
        case = f"{layer} r50-whole=2 r101-whole=3"
        for provider, ratio in (
            ("torch", 1.0),
            ("onednn", 1.4),
            ("winograd", 1.0 + channels / 512),
        ):
            made = row("conv", case, provider, channels / ratio, ratio)
            rows.append(with_floor(made, channels / 3, channels / 8))
    for mode, ms in (("whole", 30000.0), ("slide", 52000.0)):
        case = f"r50 {mode} 1024x2048 from=host"
        for provider, ratio in (("plain-fp32", 1.0), ("fused-fp32", 2.0), ("fused-bf16", 3.9)):
            rows.append(row("model", case, provider, ms / ratio, ratio, peak_mb=3000 / ratio))
        rows.append(
            without_times(rows[-1], "onnxruntime-fp32", "absent: No module named 'onnxruntime'")
        )
    for case, ms, ratio in (("whole", 1300.0, 31.0), ("slide", 1200.0, 22.0)):
        rows.append(row("post", f"{case} 1024x2048 fp32", "plain", ms, peak_mb=335.0))
        made = row("post", f"{case} 1024x2048 fp32", "ours-torch", ms / ratio, ratio, peak_mb=3.0)
        rows.append(made)
    for provider, ratio in (("mmseg", 1.0), ("ours", 1.01)):
        case = "r50 256x512 B=1 fp32"
        rows.append(row("train-mem", case, provider, 9000 / ratio, ratio, peak_mb=1500 / ratio))
    for provider, ratio in (("mmseg", 1.0), ("ours", 11.0)):  # of a suite that is gone
        rows.append(row("scale", "post-processing 512x1024 fp32", provider, 330 / ratio, ratio))
    return rows


def gpu_rows():
    """Some suites on a GPU, with a forecast and a provider that is wrong."""
    where = GPU | {"threads": None}
    case = "block B=1 N=32768 bf16 channels-last"
    forecast = {"predicted_ms": "0.14-0.175"}
    graph = where | {"dtype": "bf16", "clock": "graph"}
    events = where | {"dtype": "bf16", "clock": "events"}
    mmseg = row("em", case, "mmseg", 1.5, cold_ms=1.6, host_us=310.0, **graph)
    return [
        mmseg,
        row("em", case, "triton", 0.2, 7.5, cold_ms=0.25, host_us=812.0, **(graph | forecast)),
        row("em", case, "ours-torch", 0.75, 2.0, cold_ms=0.8, host_us=420.0, **events),
        without_times(mmseg, "mmseg-compiled", "failed: error 1"),
        row("model", "r50 whole 1024x2048 from=host", "plain-fp32", 100.0, **where),
        row("model", "r50 whole 1024x2048 from=host", "fused-bf16", 12.5, 8.0, **where),
        row("train-mem", "r50 512x1024 B=2 fp32", "mmseg", 300.0, peak_mb=5600.0, **where),
        row("train-mem", "r50 512x1024 B=2 fp32", "ours", 290.0, 1.03, peak_mb=5400.0, **where),
    ]
