"""Settings of the process that several threads change."""

import itertools
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from emanet_triton.kernels.settings import Setting


class Valve:
    """Something of the process with one value, and how often that was set."""

    def __init__(self):
        self.value, self.times = "usual", 0
        self.setting = Setting(lambda value: self.value == value, self.set)

    def set(self, value):
        before, self.value = self.value, value
        self.times += 1

        def restore():
            self.value = before

        return restore


@pytest.fixture
def valve():
    return Valve()


def test_the_value_holds_within_and_is_put_back(valve):
    with pytest.raises(KeyError), valve.setting("open"):
        assert valve.value == "open"
        with valve.setting("closed"):
            assert valve.value == "closed"
        assert valve.value == "open"
        raise KeyError
    assert valve.value == "usual"


def test_who_wants_the_same_shares_it(valve):
    with valve.setting("open"), valve.setting("open"):
        assert valve.times == 1
    with valve.setting("usual"):
        assert valve.times == 1
    assert valve.value == "usual"


@pytest.mark.parametrize("values", [*itertools.product(["open", "closed", "usual"], repeat=3)])
@pytest.mark.parametrize("order", [*itertools.permutations(range(3))])
def test_contexts_end_in_any_order(valve, values, order):
    contexts = [valve.setting(value) for value in values]
    for context, value in zip(contexts, values, strict=True):
        context.__enter__()
        assert valve.value == value
    for ended in order:
        assert values.count(values[-1]) < 3 or valve.value == values[-1]
        contexts[ended].__exit__(None, None, None)
    assert valve.value == "usual"
    with valve.setting("open"):  # nobody is left who would share it wrongly
        assert valve.value == "open"


def test_threads_that_want_the_same_have_it_all_the_time(valve):
    """Each thread leaves while others stay, and looks at the value after others have left."""

    def found(_):
        with valve.setting("open"):
            values = {valve.value}
            time.sleep(1e-4)
            return values | {valve.value}

    with ThreadPoolExecutor(8) as pool:
        assert set().union(*pool.map(found, range(400))) == {"open"}
    assert valve.value == "usual"


def test_what_contexts_share_is_held_once(valve):
    with valve.setting("open"), valve.setting("open"), valve.setting("open"):
        assert len(valve.setting._held) == 1
    assert valve.setting._held == []
