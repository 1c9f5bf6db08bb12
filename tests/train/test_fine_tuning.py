"""Fine-tuning the shipped weights on five merged classes, by the commands of docs/train.md."""

import json
import shutil
from pathlib import Path

from emanet_triton.data.scenes.generate import write_scenes
from emanet_triton.eval.__main__ import main as evaluate
from emanet_triton.train.__main__ import main

FIVE = Path(__file__).parents[2] / "demo" / "five.toml"
ITERATIONS = 300
LEAST = 75.0  # percent of mIoU; see docs/train.md for what a larger set reaches


def test_five_classes_in_300_iterations(tmp_path, capsys):
    write_scenes(tmp_path / "scenes", "train", 100)
    write_scenes(tmp_path / "scenes", "val", 16)
    data, out = tmp_path / FIVE.name, tmp_path / "out"
    shutil.copy(FIVE, data)
    arguments = (
        f"--data {data} --out {out} --init emanet_demo --iterations {ITERATIONS} --batch-size 4 "
        "--crop 96x192 --optimizer adamw --lr 2e-3 --min-lr 0 --weight-decay 0.02 --ratios 1,1 "
        "--no-colors --val-every 300 --workers 1 --threads 1"
    )
    assert main(arguments.split()) == 0
    said = capsys.readouterr()
    assert said.err.count("is for 19 classes, the model for 5; the model's") == 1
    assert "| flat " in said.out
    json_file = tmp_path / "report.json"
    best = str(out / "best.safetensors")
    assert evaluate(["--ckpt", best, "--data", str(data), "--json", str(json_file)]) == 0
    report = json.loads(json_file.read_text())
    assert report["mIoU"] > LEAST
    assert len(report["IoU"]) == 5
