"""Kill evaluations at random moments, resume them, and compare with an undisturbed one.

``python -m tests.kills --kills 60`` takes about a quarter of an hour on two cores.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from emanet_triton.data.scenes.generate import write_scenes

ROOT = Path(__file__).parents[1]
SIGNALS = (signal.SIGKILL,) * 4 + (signal.SIGTERM, signal.SIGINT)
# As the command line, with a partial result that is written after every image.
COMMAND = """
from emanet_triton.command import run
from emanet_triton.eval import __main__, partial

partial._SECONDS_BETWEEN_WRITES = partial._REST = 0.0
run(__main__.main)
"""
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
SLOWEST = 300  # seconds; no run of a few images takes as long


@dataclass
class Tally:
    """Counts of the kills and of the runs that found earlier images, and results that differ."""

    kills: int = 0
    resumed: int = 0
    differing: list[str] = field(default_factory=list)


class Evaluation:
    """The demonstration's network on some scenes, in one or several processes.

    Args:
        folder: for the scenes, the cache and the results.
        images: number of scenes.
        processes: ranks.
    """

    def __init__(self, folder: Path, images: int, processes: int) -> None:
        self.folder, self.processes = folder, processes
        folder.mkdir(parents=True)
        write_scenes(folder / "data", "val", images)
        self.script = folder / "evaluation.py"
        self.script.write_text(COMMAND)

    def start(self, name: str, *more: str) -> subprocess.Popen:
        """Begin to evaluate into the folder ``name``."""
        out = self.folder / name
        launcher = (*TORCHRUN, str(self.processes)) if self.processes > 1 else ()
        command = [sys.executable, *launcher, str(self.script), "--ckpt", "emanet_demo"]
        command += ["--data", str(self.folder / "data"), "--threads", "1", "--workers", "2"]
        command += ["--save-predictions", str(out / "p"), "--save-overlays", str(out / "o")]
        search = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        own = {"XDG_CACHE_HOME": str(self.folder / "cache"), "PYTHONPATH": search}
        with (self.folder / "log").open("ab") as log:
            return subprocess.Popen(
                [*command, "--json", str(out / "figures.json"), *more],
                env=os.environ | own,
                stdout=log,
                stderr=log,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )

    def results(self, name: str) -> dict[str, object]:
        """The confusion matrix, and every file among the pictures."""
        out = self.folder / name
        figures = json.loads((out / "figures.json").read_text())
        files = {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.glob("[po]/*"))}
        return {"confusion": figures["confusion"], **files}

    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")


def kill(process: subprocess.Popen, rng: random.Random, seconds: float) -> bool:
    """Send a random signal to one or all processes after some seconds; False if too late."""
    try:
        process.wait(seconds)
        return False
    except subprocess.TimeoutExpired:
        processes = family(process.pid)
    signum = rng.choice(SIGNALS)
    alone = signum == signal.SIGKILL and rng.random() < 0.5  # one rank, or torchrun itself
    for pid in [rng.choice(processes)] if alone else processes[::-1]:
        send(pid, signum)
    try:
        process.wait(SLOWEST)
    finally:
        for pid in processes:
            send(pid, signal.SIGKILL)  # ranks whose torchrun was killed
    return True


def family(pid: int) -> list[int]:
    """A process and its children, the ranks of a torchrun."""
    return [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]


def send(pid: int, signum: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signum)


def torment(evaluation: Evaluation, kills: int, seed: int) -> Tally:
    """Kill and resume until all kills are done and the last run has ended by itself."""
    rng, tally, run = random.Random(seed), Tally(), 0
    begun = time.monotonic()
    assert evaluation.start("undisturbed").wait(SLOWEST) == 0, evaluation.log()
    took = time.monotonic() - begun
    want = evaluation.results("undisturbed")
    while tally.kills < kills:
        run += 1
        name, ended = f"run{run}", False
        process = evaluation.start(name)
        while not ended and tally.kills < kills:
            if kill(process, rng, rng.uniform(0.3, 1.0) * took):
                tally.kills += 1
                process = evaluation.start(name, "--resume")
            else:
                ended = True
        code = process.wait(SLOWEST)
        if code or evaluation.results(name) != want:
            tally.differing.append(f"{evaluation.folder / name} (exit code {code})")
    resumed = [
        line for line in evaluation.log().replace("\r", "\n").splitlines() if "resuming:" in line
    ]
    tally.resumed = sum("resuming: 0 of" not in line for line in resumed)
    return tally


def main() -> int:
    """Half of the kills in one process, half in two; exit code 1 if a result differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    differing = []
    with tempfile.TemporaryDirectory() as folder:
        shares = {1: args.kills - args.kills // 2, 2: args.kills // 2}
        for processes, kills in filter(all, shares.items()):
            evaluation = Evaluation(Path(folder, str(processes)), args.images, processes)
            tally = torment(evaluation, kills, args.seed + processes)
            print(
                f"{processes} process(es): {tally.kills} kills, {tally.resumed} runs resumed, "
                f"{len(tally.differing)} results differ",
                flush=True,
            )
            differing += tally.differing
    for each in differing:
        print(each)
    return bool(differing)


if __name__ == "__main__":
    sys.exit(main())
