"""An evaluation in two ranks of a torchrun, and in one rank of a training."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_eval
from kills import TORCHRUN
from tiny_eval import run, tiny_process

TESTS = Path(tiny_eval.__file__).parent


@pytest.mark.parametrize(
    "options", [[], ["--no-fuse", "--threads", "2"]], ids=["fused", "plain_of_as_many_threads"]
)
def test_two_ranks_count_as_one(tmp_path, city, ckpt, threads, options):
    single = run(tmp_path, city, ckpt, *options)
    out = tmp_path / "two.json"
    command = ["--ckpt", str(ckpt), "--data", str(city), "--json", str(out), "--limit", "5"]
    done = subprocess.run(
        tiny_process(*command, *options, launcher=(*TORCHRUN, "2")),
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("bicycle") == 1
    want = run(tmp_path, city, ckpt, "--limit", "5", *options)
    assert json.loads(out.read_text())["confusion"] == want["confusion"] != single["confusion"]


RANK = """
import os, sys, tiny_eval
from emanet_triton.errors import InputError
from emanet_triton.eval import link
from emanet_triton.eval import plan as jobs
from emanet_triton.inference.predictor import Predictor

link.BEAT_SECONDS = 0.2

def fail(*_):
    raise {error}

if os.environ["RANK"] == "{rank}":
    {where} = fail
sys.exit(tiny_eval.main(sys.argv[1:]))
"""


def run_ranks(tmp_path, command, *, rank: int, where: str, error: str) -> list[str]:
    """Run two ranks, of which one fails, and return their messages."""
    script = tmp_path / "rank.py"
    script.write_text(RANK.format(rank=rank, where=where, error=error))
    search = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *TORCHRUN, "2", str(script), *command],
        env=os.environ | {"PYTHONPATH": search, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1  # the exit code of torchrun
    return re.findall("error(?: on rank [01])?: .*|interrupted.*", done.stderr)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("where", ["jobs.keep_out", "Predictor.__call__"])
def test_what_ends_one_rank_ends_all_with_its_message(tmp_path, command, rank, where):
    said = run_ranks(tmp_path, command, rank=rank, where=where, error="InputError('out of luck')")
    assert said == ["error" + " on rank 1" * rank + ": out of luck"]


TRAINING = """
import os, subprocess, sys, time
if os.environ["RANK"] == "0":
    sys.exit(subprocess.run(sys.argv[1:]).returncode)
time.sleep(2)
"""


def test_a_training_evaluates_in_one_of_its_ranks(tmp_path, command):
    script, out = tmp_path / "training.py", tmp_path / "out.json"
    script.write_text(TRAINING)
    evaluation = [sys.executable, str(TESTS / "tiny_eval.py"), *command, "--json", str(out)]
    done = subprocess.run(
        [sys.executable, *TORCHRUN, "2", str(script), *evaluation],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "note: started inside rank 0 of a torchrun, this evaluation runs alone" in done.stderr
    assert json.loads(out.read_text())["images"] == 6
