"""Settings of the training's tests."""

import pytest
import torch
from small_trainings import write_small_scenes

from emanet_triton.train.__main__ import main


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """A data set that no test changes."""
    return write_small_scenes(tmp_path_factory.mktemp("scenes"))


@pytest.fixture
def own_scenes(tmp_path):
    """A data set for one test."""
    return write_small_scenes(tmp_path / "scenes")


@pytest.fixture(autouse=True)
def _same_state_of_torch():
    """The command sets the number of threads and the seed of the process."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def fails(capsys):
    """Run a training that must fail, and return what it says."""

    def check(*arguments) -> str:
        code = main([str(argument) for argument in arguments])
        # A progress bar ends its last line with a carriage return, and begins none.
        said = [line.rpartition("\r")[2] for line in capsys.readouterr().err.split("\n")]
        assert code == 2
        assert not any("Traceback" in line for line in said)
        return "\n".join(said).strip()

    return check
