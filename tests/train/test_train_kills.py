"""A training that is killed at random moments and resumed, against one that nobody disturbed."""

import os
import random
import subprocess
import sys
import time

from small_trainings import options

from emanet_triton.train.__main__ import main

KILLS = 3
LONG = {"iterations": 40, "val_every": 10, "keep_every": 10, "ema": 0.9, "workers": 1}
SLOWEST = 120  # seconds


def test_killed_and_resumed(scenes, tmp_path):
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    assert main(options(scenes, out=undisturbed, **LONG)) == 0
    command = [sys.executable, "-m", "emanet_triton.train"]
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    for _ in range(KILLS):
        state = killed / "state.pth"
        before = state.stat().st_mtime_ns if state.exists() else 0
        resume = {"resume": True} if before else {}
        arguments = [*command, *options(scenes, out=killed, **LONG, **resume)]
        with subprocess.Popen(
            arguments,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            start_new_session=True,
        ) as process:
            deadline = time.monotonic() + SLOWEST
            while process.poll() is None and time.monotonic() < deadline:
                if state.exists() and state.stat().st_mtime_ns > before:
                    break
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 1.0))  # one to many more iterations, or a validation
            process.kill()
    assert main(options(scenes, out=killed, resume=True, **LONG)) == 0
    names = {path.name for path in undisturbed.iterdir()}
    left = [path.name for path in killed.iterdir() if not path.name.startswith(".")]
    assert set(left) == names, f"seed {seed}"
    for name in sorted(names):
        if name.endswith(".safetensors"):
            same = (undisturbed / name).read_bytes() == (killed / name).read_bytes()
            assert same, f"{name}, seed {seed}"
    logs = [(folder / "val.csv").read_text() for folder in (undisturbed, killed)]
    assert logs[0] == logs[1], f"seed {seed}"
