"""Whether a process is a rank of a torchrun, and which rank."""

import os
import subprocess
import sys

import pytest

from emanet_triton.errors import InputError
from emanet_triton.eval import torchrun
from emanet_triton.eval.ranks import Ranks, ranks
from emanet_triton.eval.torchrun import Place, find_place, is_inside_a_rank

RANK = {
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_RESTART_COUNT": "0",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "host",
    "MASTER_PORT": "29500",
}


def test_the_place_in_a_torchrun():
    assert find_place(RANK) == Place(5, 8, 1, 4, "host", 29500, True, "1", "0")
    assert find_place({}) is None
    # As SLURM and mpirun set them.
    assert find_place({"RANK": "1", "WORLD_SIZE": "2", "SLURM_PROCID": "1"}) is None


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ({"RANK": "abc"}, "RANK=abc, WORLD_SIZE=8"),
        ({"RANK": "-1"}, "RANK=-1, WORLD_SIZE=8"),
        ({"RANK": "8"}, "RANK=8, WORLD_SIZE=8"),
        ({"WORLD_SIZE": None}, "RANK=5, WORLD_SIZE=(missing)"),
        ({"LOCAL_RANK": "4"}, "LOCAL_RANK=4, LOCAL_WORLD_SIZE=4"),
        ({"LOCAL_WORLD_SIZE": "9"}, "LOCAL_RANK=1, LOCAL_WORLD_SIZE=9"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR=, MASTER_PORT=29500"),
        ({"MASTER_PORT": "70000"}, "MASTER_ADDR=host, MASTER_PORT=70000"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_variables_that_are_not_usable(change, shown):
    changed = {k: v for k, v in (RANK | change).items() if v is not None}
    with pytest.raises(InputError) as error:
        find_place(changed)
    begin, _, end = str(error.value).partition(": ")
    assert begin == "torchrun's environment variables are not usable"
    assert shown in end
    assert end.endswith(
        "; start all ranks with torchrun, or unset TORCHELASTIC_RUN_ID to run alone"
    )


ASK = "from emanet_triton.eval.torchrun import *; print(is_inside_a_rank())"
PYTHON = [sys.executable, "-c", "import subprocess, sys; subprocess.run(sys.argv[1:], check=True)"]
ON_ANOTHER_PORT = """
import os, subprocess, sys

os.environ["MASTER_PORT"] = "29501"
subprocess.run(sys.argv[1:], check=True)
"""
SHELL = ["sh", "-c", '"$@"; true', "sh"]  # the shell stays the parent of the process that it starts


@pytest.mark.parametrize(
    ("above", "inside"),
    [
        ([], False),
        (SHELL, False),
        (SHELL + SHELL, False),
        (PYTHON, True),
        (PYTHON + SHELL, True),
        (SHELL + PYTHON, True),
        ([sys.executable, "-c", ON_ANOTHER_PORT], False),
    ],
    ids=[
        "rank",
        "rank in a shell",
        "rank in two shells",
        "in a training",
        "in a shell in a training",
        "in a training in a shell",
        "rank of a torchrun in a training",
    ],
)
def test_what_a_training_starts_is_no_rank(above, inside):
    command = [*above, sys.executable, "-c", ASK]
    done = subprocess.run(command, env=os.environ | RANK, capture_output=True, text=True)
    assert done.stdout.strip() == str(inside), done.stderr


def test_a_process_group_in_use_is_a_trainings(monkeypatch):
    assert not is_inside_a_rank(RANK)
    monkeypatch.setattr(torchrun.dist, "is_initialized", lambda: True)
    assert is_inside_a_rank(RANK)


def test_inside_a_rank_it_runs_alone_on_the_ranks_gpu(monkeypatch):
    for name, value in RANK.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torchrun.dist, "is_initialized", lambda: True)
    said = []
    with ranks(said.append) as group:
        assert group == Ranks(local_rank=1)
    assert said == ["note: started inside rank 5 of a torchrun, this evaluation runs alone"]


def test_a_torchrun_of_one_process_needs_no_store(monkeypatch):
    for name, value in (RANK | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    with ranks(print) as group:
        assert group == Ranks()
