"""A load on ``serve.py``: are all answers right, and how much slower is it than its network?

    python examples/load_test.py --seconds 30 --csv load.csv

Eight clients send JPEG files of three sizes, one after the other. Every answer must be the PNG of
the labels that a ``Predictor`` gives. By turns with this load the same predictor segments the same
pictures in this process, while the service is idle: this is the rate of the network alone.
"""

import hashlib
import http.client
import itertools
import re
import subprocess
import sys
import tempfile
import threading
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import torch

from emanet_triton import Predictor, command, create_model, list_models
from emanet_triton.bench.script_csv import require_table, write_table
from emanet_triton.data.picture import decode_picture
from emanet_triton.data.png import encode_png
from emanet_triton.data.scenes.generate import generate_scene
from emanet_triton.errors import InputError
from emanet_triton.inference.build import PRECISIONS, ready_network
from emanet_triton.kernels.device import cpu_name
from emanet_triton.models.checkpoint import read_checkpoint

R50 = "emanet_r50-d8_512x1024_80k_cityscapes"
SIZES = ((512, 1024), (480, 1024), (512, 896))  # height and width
OF_EACH = 4  # pictures of each size
ADDRESS = re.compile(r"http://(\S+):(\d+)")


class Served:
    """``serve.py`` in a process of its own, on a free port.

    Args:
        options: of the command line.

    Attributes:
        process: the server; its standard output is a pipe.
    """

    def __init__(self, *options: str) -> None:
        script = str(Path(__file__).with_name("serve.py"))
        self.process = subprocess.Popen(
            [sys.executable, script, "--host", "127.0.0.1", "--port", "0", *options],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        found = ADDRESS.search(self.process.stdout.readline())
        if found is None:
            raise InputError("the service did not start")
        self.host, self.port = found[1], int(found[2])

    def connect(self) -> http.client.HTTPConnection:
        """A connection for any number of requests, one after the other."""
        return http.client.HTTPConnection(self.host, self.port, timeout=300)

    def ask(self, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        """The status and the body of the answer to a POST, or without a body to a GET."""
        connection = self.connect()
        try:
            connection.request("GET" if body is None else "POST", path, body)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def wait_until_ready(self) -> None:
        """Wait for the first picture of the service's own.

        Raises:
            InputError: the service ended.
        """
        while self.ask("/health")[0] != 200:
            time.sleep(0.1)

    def metric(self, name: str) -> float:
        """The value of a metric, for its labels or summed over them."""
        text = self.ask("/metrics")[1].decode()
        found = re.findall(rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
        return sum(map(float, found))

    def __enter__(self) -> "Served":
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.communicate()


@dataclass(frozen=True)
class Picture:
    """A picture as a client has it.

    Attributes:
        file: the content of a JPEG file.
        image: its pixels, uint8 RGB [H, W, 3].
        answer: the SHA-256 of the right answer.
    """

    file: bytes
    image: np.ndarray
    answer: bytes


class Clients:
    """Clients that each send one picture after the other.

    Attributes:
        seconds: of each answer.
        wrong: the number of requests with no answer, another status or other labels.
    """

    def __init__(self, served: Served, pictures: Sequence[Picture]) -> None:
        self.seconds: list[float] = []
        self.wrong = 0
        self._served, self._pictures = served, itertools.cycle(pictures)
        self._lock = threading.Lock()

    def run(self, number: int, seconds: float) -> float:
        """Send pictures for a time, and return the images a second."""
        start = time.perf_counter()
        threads = [
            threading.Thread(target=self._send, args=(start + seconds,)) for _ in range(number)
        ]
        before = len(self.seconds)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return (len(self.seconds) - before) / (time.perf_counter() - start)

    def _send(self, end: float) -> None:
        connection = self._served.connect()
        while time.perf_counter() < end:
            with self._lock:
                picture = next(self._pictures)
            start = time.perf_counter()
            try:
                connection.request("POST", "/segment", picture.file)
                response = connection.getresponse()
                answer = hashlib.sha256(response.read()).digest()
                right = response.status == 200 and answer == picture.answer
            except (OSError, http.client.HTTPException):
                right = False
                connection.close()  # the next request opens it again
            with self._lock:
                self.seconds.append(time.perf_counter() - start)
                self.wrong += not right
        connection.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 1 if an answer was wrong."""
    return command.answer(lambda: _main(make_parser().parse_args(arguments)))


def make_parser() -> command.Parser:
    """The parser of all options."""
    parser = command.Parser(
        prog="python examples/load_test.py", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("--model", choices=list_models(), default=R50, help="with random weights; default: R50")
    add("--seconds", type=command.count, default=30, help="of each turn; default: %(default)s")
    add("--turns", type=command.count, default=3, help="of both; default: %(default)s")
    add("--clients", type=command.count, default=8, help="at once; default: %(default)s")
    add("--batch-size", type=command.count, default=4, help="default: %(default)s")
    add("--threads", type=command.thread_count, default=2, help="default: %(default)s")
    add("--precision", choices=PRECISIONS, default="bf16", help="default: %(default)s")
    add("--csv", type=Path, metavar="OUT", help="write the figures to a file")
    return parser


def _main(args: Namespace) -> int:
    if args.csv:
        require_table(args.csv)
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "random.pth"
        torch.manual_seed(0)
        torch.save(create_model(args.model).state_dict(), checkpoint)
        network = ready_network(
            args.model, read_checkpoint(checkpoint), torch.device("cpu"), args.precision
        )
        height, width = SIZES[0]
        predictor = Predictor(
            network,
            replace(network.protocol, base_scale=(width, height)),
            precision=args.precision,
            batch_size=args.batch_size,
        )
        pictures = draw_pictures(predictor)
        options = {
            "ckpt": checkpoint,
            "model": args.model,
            "scale": f"{width}x{height}",
            "precision": args.precision,
            "batch-size": args.batch_size,
            "threads": args.threads,
            "timeout-s": 300,
        }
        with Served(*(f"--{name}={value}" for name, value in options.items())) as served:
            served.wait_until_ready()
            row = measured(args, served, predictor, pictures)
    for name, value in row.items():
        command.say(f"{name:31} {value}")
    if args.csv:
        write_table(args.csv, [row], device=cpu_name())
    return 1 if row["wrong answers"] else 0


def draw_pictures(predictor: Predictor) -> list[Picture]:
    """Street scenes of all sizes by turns, with the right answers."""
    pictures = []
    for seed, (height, width) in enumerate(SIZES * OF_EACH):
        scene, _ = generate_scene(seed, height, width)
        _, encoded = cv2.imencode(".jpg", cv2.cvtColor(scene, cv2.COLOR_RGB2BGR))
        file = encoded.tobytes()
        image = decode_picture(file, "the picture")
        (labels,) = predictor([image])
        answer = hashlib.sha256(encode_png(labels.cpu().numpy())).digest()
        pictures.append(Picture(file, image, answer))
    return pictures


def measured(
    args: Namespace, served: Served, predictor: Predictor, pictures: Sequence[Picture]
) -> dict[str, object]:
    """The figures of all turns."""
    clients = Clients(served, pictures)
    alone, rates, served_s = [], [], 0.0
    for _ in range(args.turns):
        alone.append(network_alone(predictor, pictures, args.seconds))
        start = time.perf_counter()
        rates.append(clients.run(args.clients, args.seconds))
        served_s += time.perf_counter() - start
    p50, p99 = np.percentile(clients.seconds, [50, 99])
    batches = served.metric("emanet_batch_images_count")
    return {
        "model": args.model,
        "clients": args.clients,
        "precision": args.precision,
        "threads": args.threads,
        "largest batch": args.batch_size,
        "mean batch": round(served.metric("emanet_batch_images_sum") / batches, 2),
        "answers": len(clients.seconds),
        "wrong answers": clients.wrong,
        "p50, s": round(float(p50), 3),
        "p99, s": round(float(p99), 3),
        "images a second": round(float(np.mean(rates)), 3),
        "network alone, images a second": round(float(np.mean(alone)), 3),
        "network busy, share of the time": round(
            served.metric("emanet_network_seconds_total") / served_s, 3
        ),
        "service / network alone": round(float(np.mean(rates) / np.mean(alone)), 3),
        "service / network alone, turns": " ".join(
            f"{rate / base:.3f}" for rate, base in zip(rates, alone, strict=True)
        ),
    }


def network_alone(predictor: Predictor, pictures: Sequence[Picture], seconds: float) -> float:
    """Images a second of the predictor, in batches of one size."""
    most = predictor.images_at_once
    images = [[each.image for each in pictures[i :: len(SIZES)]] for i in range(len(SIZES))]
    batches = [alike[i : i + most] for alike in images for i in range(0, len(alike), most)]
    start, done = time.perf_counter(), 0
    for batch in itertools.cycle(batches):
        (labels,) = predictor.results(batch)
        done += len(labels.cpu())
        if time.perf_counter() >= start + seconds:
            break
    return done / (time.perf_counter() - start)


if __name__ == "__main__":
    command.run(main)
