"""A kill at a random moment; ``python -m tests.kills`` does more."""

import subprocess
import sys

import kills
import pytest
from kills import Evaluation, torment


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_runs_are_resumed_to_the_same_bits(tmp_path, processes):
    evaluation = Evaluation(tmp_path / "kills", images=6, processes=processes)
    tally = torment(evaluation, kills=1, seed=processes)
    assert (tally.kills, tally.differing) == (1, []), evaluation.log()


def test_the_command_line():
    done = subprocess.run(
        [sys.executable, kills.__file__, "--kills", "1", "--images", "2"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1 process(es): 1 kills, ")
    assert done.stdout.endswith(" 0 results differ\n")
