"""The suite scale: exact at every size, and the growth that its summary fits."""

import pytest
import torch
from torch.nn import functional as F

from emanet_triton.bench.__main__ import main
from emanet_triton.bench.options import Selection
from emanet_triton.bench.rows import Row, read_rows
from emanet_triton.bench.suites import scale


def test_a_tiny_run(tmp_path, capsys):
    assert main(["scale", "--tiny", "--rounds", "3", "--csv", str(tmp_path / "rows.csv")]) == 0
    rows = read_rows(tmp_path / "rows.csv")
    assert len(rows) == 12
    assert all(row.gate == "passed" and row.p50_ms > 0 for row in rows)
    assert "emanet_demo, ours: time grows as pixels ^" in capsys.readouterr().out


def test_the_sampled_reference_is_torchs_resize():
    size = (37, 53)
    logits = torch.randn(1, 19, 5, 7, dtype=torch.float64)
    want = F.interpolate(logits, size, mode="bilinear", align_corners=False)[0].flatten(1)
    rows, columns = torch.meshgrid(*map(torch.arange, size), indexing="ij")
    got = scale._interpolated(logits, size, rows.flatten(), columns.flatten())
    torch.testing.assert_close(got, want)


def test_wrong_labels_do_not_pass():
    size = (64, 128)
    logits = scale._random_logits(size, "cpu")
    labels = scale._full_size_labels(logits, size)
    assert scale._wrong(labels, logits, size) == 0
    assert scale._wrong((labels + 1) % 19, logits, size) == 1
    assert scale._network_error(logits, (labels + 1) % 19, lambda: logits, size) == float("inf")
    assert scale._network_error(logits, labels, lambda: logits, size) == 0


def test_what_takes_minutes_or_more_memory_than_there_is_is_absent(monkeypatch):
    monkeypatch.setattr(scale, "_random_logits", lambda size, device: torch.zeros(1, 19, 1, 1))
    cases = {case.name: case for case in scale.cases(Selection())}
    with pytest.raises(scale.Absent, match="takes minutes at this size"):
        cases["post-processing 8192x8192 fp32"].providers["mmseg"]()
    monkeypatch.setattr(scale, "_meminfo", lambda: "MemAvailable:  1000 kB\n")
    with pytest.raises(scale.Absent, match=r"needs 0\.1 GB, 0\.0 are available"):
        cases["post-processing 512x1024 fp32"].providers["mmseg"]()


def test_sizes_reach_8192():
    names = [case.name for case in scale.cases(Selection())]
    assert names[0] == "post-processing 512x1024 fp32"
    assert "post-processing 8192x8192 fp32" in names
    assert names[-1] == "emanet_demo 2048x4096 fp32"
    asked = scale.cases(Selection(sizes=((4096, 8192),), networks=("r101",)))
    assert [case.name for case in asked] == [
        "post-processing 4096x8192 fp32",
        "r101 4096x8192 fp32",
    ]


@pytest.mark.parametrize("quick", [False, True])
def test_on_a_gpu_sizes_end_at_2048_unless_asked_for(quick):
    names = [case.name for case in scale.cases(Selection("cuda", quick=quick))]
    assert names == [
        f"{what} {size} fp32"
        for what in ("post-processing", "r50")
        for size in ("512x1024", "1024x2048", "2048x4096")
    ]
    asked = scale.cases(Selection("cuda", sizes=((8192, 8192),)))
    assert [case.name for case in asked][-1] == "r50 8192x8192 fp32"


def test_the_summary_fits_what_ran_at_three_sizes():
    def row(size, provider, ms):
        name = f"post-processing {size}x{size} fp32"
        return Row("scale", name, provider, "passed", p50_ms=ms, peak_mb=ms)

    rows = [row(size, "ours", size**2 / 1e6) for size in (100, 200, 400)]
    rows += [row(size, "mmseg", 1.0) for size in (100, 200)]
    assert scale.summary(rows).splitlines() == [
        "post-processing, ours: time grows as pixels ^ 1.00 (R² 1.000, 3 points)",
        "post-processing, ours: peak memory grows as pixels ^ 1.00 (R² 1.000, 3 points)",
    ]
