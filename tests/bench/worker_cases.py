"""A suite whose providers end or hang their process. A child imports it from here."""

import os
import time

from emanet_triton.bench.case import Case

DEAD = []  # errors after which nothing runs in this process


def right():
    if DEAD:
        raise DEAD[0]
    return lambda: 1.0


def wrong():
    return lambda: 2.0


def aborts():
    return os.abort


def aborts_when_timed():
    """After the call of its gate and its early rounds."""
    calls = iter(range(5))
    return lambda: 1.0 if next(calls, None) is not None else os.abort()


def hangs():
    return lambda: time.sleep(600)


def sticky():
    DEAD.append(RuntimeError("CUDA error: an illegal memory access was encountered\nand more"))
    raise DEAD[0]


def lost_in_preparation():
    os._exit(3)


def cases(selection):
    """Three cases: the first ends before any provider runs, the second has bad providers."""
    lives = {"plain": right, "ours": right}
    costly = {
        "plain": right,
        "aborts": aborts,
        "late": aborts_when_timed,
        "hangs": hangs,
        "wrong": wrong,
        "sticky": sticky,
        "ours": right,
    }
    for name, providers, prepare in (
        ("unprepared", lives, lost_in_preparation),
        ("costly", costly, None),
        ("healthy", lives, None),
    ):
        yield Case(
            *("em", name, providers, "plain"),
            error=lambda got: abs(got - 1),
            bound=0.01,
            prepare=prepare,
        )
