"""How long R50 takes for one image of 512x1024 pixels, from normalised pixels to labels.

    make test-mmseg TIMES=benchmarks/results/mmseg

Only this option measures.
"""

import statistics
import time
from pathlib import Path

import mmseg
import pytest
import torch
import versions_of_mmseg as mm

import emanet_triton.mmseg  # noqa: F401  # registers the classes
from emanet_triton.bench.script_csv import write_table
from emanet_triton.kernels.device import cpu_name

SIZE = (512, 1024)
ROUNDS = 5
LABELS_ONLY = {"labels_only": True} if mm.VERSION_1 else {}
# What is measured: the type of the segmentor, whether the head is ours, and more options.
WAYS = {
    "mmsegmentation": ("EncoderDecoder", False, {}),
    "our EMAHead": ("EncoderDecoder", True, {}),
    "FusedEMANet": ("FusedEMANet", True, {}),
    "FusedEMANet in bfloat16": ("FusedEMANet", True, {"precision": "bf16"}),
}
if mm.VERSION_1:
    WAYS |= {
        f"{name}, labels only": (*way[:2], {**way[2], **LABELS_ONLY})
        for name, way in WAYS.items()
        if way[0] == "FusedEMANet"
    }


def segmentor(kind, our_head, options):
    """A real R50 with the weights that ``enliven`` gives."""
    config = mm.Config.fromfile(str(mm.PUBLISHED["r50-512x1024"]))
    config.model.pretrained = None
    config.model.update(type=kind, **options)
    if not our_head:
        config = mm.reference_of(config)
    return mm.build(config)


def test_times(request):
    folder = request.config.getoption("--times")
    if folder is None:
        pytest.skip("wanted only with --times")
    models = {name: segmentor(*way) for name, way in WAYS.items()}
    weights = mm.enliven(models["mmsegmentation"]).state_dict()
    inputs = [mm.images_of(1, SIZE)]
    seconds = {name: [] for name in models}
    labels = {}
    for model in models.values():
        model.load_state_dict(weights)
    for i in range(ROUNDS + 1):  # the first round makes the fused networks
        for name, model in models.items():
            start = time.perf_counter()
            labels[name] = mm.tested(model, inputs, [mm.metas_of(1, SIZE, SIZE)])
            if i > 0:
                seconds[name].append(time.perf_counter() - start)
    own = labels["mmsegmentation"]
    rows = [
        {
            "mmsegmentation": mmseg.__version__,
            "way": name,
            "seconds": round(statistics.median(seconds[name]), 3),
            "fastest": round(min(seconds[name]), 3),
            "slowest": round(max(seconds[name]), 3),
            "equal labels, %": round(100 * float((labels[name] == own).mean()), 3),
        }
        for name in models
    ]
    where = {"device": cpu_name(), "threads": torch.get_num_threads(), "rounds": ROUNDS}
    path = Path(folder) / f"times_{mmseg.__version__}.csv"
    write_table(path, rows, **where)
    print(path.read_text())
    assert min(row["equal labels, %"] for row in rows) > 90
