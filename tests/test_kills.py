"""A kill at a random moment; ``python -m tests.kills`` does more."""

import subprocess
import sys

import kills
from kills import Evaluation, torment


def test_two_killed_ranks_are_resumed_to_the_same_bits(tmp_path):
    evaluation = Evaluation(tmp_path / "kills", images=6, processes=2)
    tally = torment(evaluation, kills=1, seed=2)
    assert (tally.kills, tally.differing) == (1, []), evaluation.log()


def test_the_command_line():
    """With one kill, all of it in one process."""
    done = subprocess.run(
        [sys.executable, kills.__file__, "--kills", "1", "--images", "6"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1 process(es): 1 kills, ")
    assert done.stdout.endswith(" 0 results differ\n")
