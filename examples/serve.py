"""A service over HTTP that segments pictures: one file to copy and change.

    pip install '.[serve]'
    python examples/serve.py --ckpt emanet_demo --port 8000
    curl --data-binary @street.jpg 'http://127.0.0.1:8000/segment?format=overlay' > overlay.png

Three kinds of threads share the work. The main thread talks to the clients (FastAPI on uvicorn). A
few threads decode pictures and encode answers. One thread, a ``Batcher``, runs the network.
"""

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
import traceback
from argparse import ArgumentTypeError, Namespace
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Literal

import numpy as np
import torch

from emanet_triton import Dataset, Predictor, class_names, command, overlay
from emanet_triton.cores import default_threads, usable_cores
from emanet_triton.data.picture import decode_picture
from emanet_triton.data.png import encode_png
from emanet_triton.errors import InputError
from emanet_triton.inference.batcher import Batcher, NoLabelsError
from emanet_triton.inference.build import PRECISIONS, open_device, ready_network
from emanet_triton.models.chosen import Chosen, choose, read_chosen

try:
    import uvicorn
    from fastapi import FastAPI, Request, Response
    from fastapi.responses import JSONResponse
    from prometheus_client import CONTENT_TYPE_LATEST, Counter, Gauge, Histogram, generate_latest
    from python_multipart.exceptions import FormParserError
    from starlette.datastructures import UploadFile
    from starlette.exceptions import HTTPException  # FastAPI's own is a subclass
    from starlette.requests import ClientDisconnect
    from starlette.types import Message
except ImportError as missing:
    command.complain(f"error: {missing.name} is missing; install it: pip install '.[serve]'")
    sys.exit(command.FAILED)

Format = Literal["labels", "overlay", "json"]
CLIENT_GONE = 499  # the status in the metrics, as in nginx's log; nobody gets this answer
DISCARDED = 2**26  # bytes of a refused body that are still received

REQUESTS = Counter(
    "emanet_requests", "Requests to segment, by the status of the answer", ["status"]
)
SECONDS = Histogram("emanet_request_seconds", "Seconds from a request's header to its answer")
UNANSWERED = Gauge("emanet_unanswered", "Requests that were accepted and have no answer yet")
QUEUE = Gauge("emanet_queue", "Decoded pictures that wait for the network")
BATCHES = Histogram("emanet_batch_images", "Pictures of a batch", buckets=(1, 2, 4, 8, 16, 32))
BUSY = Counter("emanet_network_seconds", "Seconds in which the network was busy")


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**16:
        raise ArgumentTypeError(f"expected a number of 0 to 65535, got '{text}'")
    return int(text)


def _time(text: str) -> float:
    return command.number(text, "a number of 0 to 1000000", lambda value: 0 <= value <= 10**6)


OPTIONS = (
    ("--model", str, None, "the model of --ckpt, if its file does not name it"),
    ("--host", str, "127.0.0.1", "the address to listen on"),
    ("--port", _port, 8000, "0: any free port"),
    ("--device", str, None, "by default cuda if there is a GPU, else cpu"),
    ("--threads", command.thread_count, default_threads(), "of the network on a CPU"),
    ("--scale", command.size, None, "WIDTHxHEIGHT for the network; by default the checkpoint's"),
    ("--batch-size", command.count, 4, "the most pictures of one size in a batch"),
    ("--wait-ms", _time, 5, "the longest time that a picture waits for others of its size"),
    ("--queue", command.count, 32, "the most requests without an answer; others get 503"),
    ("--workers", command.thread_count, usable_cores(), "decode pictures and encode answers"),
    ("--timeout-s", _time, 30, "a request without an answer after this time gets 504"),
    ("--grace-s", _time, 30, "the longest time for the last answers after SIGTERM or Ctrl-C"),
    ("--max-bytes", command.count, 2**24, "the largest request; a larger one gets 413"),
    ("--max-pixels", command.count, 2**23, "the largest picture; a larger one gets 422"),
)


class Service:
    """Answers requests.

    Args:
        batcher: segments pictures.
        dataset: whose classes the labels are.
        args: the options of the command line.

    Attributes:
        stopping: whether new requests are refused because the process will end.
        unanswered: the number of requests that were accepted and have no answer yet.
    """

    def __init__(self, batcher: Batcher, dataset: Dataset, args: Namespace) -> None:
        self.batcher, self.dataset, self.args = batcher, dataset, args
        self.stopping = False
        self.unanswered = 0
        self._pool = ThreadPoolExecutor(args.workers)
        UNANSWERED.set_function(lambda: self.unanswered)
        QUEUE.set_function(batcher.waiting)

    def app(self) -> FastAPI:
        """The three addresses below, and FastAPI's own page at ``/docs``."""
        app = FastAPI(title="EMANet")
        kinds = ("image/jpeg", "image/png", "multipart/form-data")
        body = {"requestBody": {"required": True, "content": {kind: {} for kind in kinds}}}
        app.post("/segment", response_class=Response, openapi_extra=body)(self.segment)
        app.get("/health")(self.health)
        app.get("/metrics")(self.metrics)
        return app

    async def segment(self, request: Request, format: Format = "labels") -> Response:
        """Segment a picture: the body of the request, or the only file of a form.

        - `labels`: a PNG of class indices, 8-bit grey
        - `overlay`: a PNG of the classes painted over the picture
        - `json`: the names of all classes and their shares of the pixels
        """
        start = time.perf_counter()
        try:
            async with asyncio.timeout(self.args.timeout_s):
                response = await self._answer(request, format)
        except HTTPException as error:
            response = refusal(error.status_code, error.detail, error.headers)
        except NoLabelsError as error:
            response = refusal(500, str(error))
        except TimeoutError:
            response = refusal(504, f"no answer within {self.args.timeout_s:g} s (--timeout-s)")
        except ClientDisconnect:
            response = refusal(CLIENT_GONE, "the client went away")
        except Exception as error:
            traceback.print_exc()
            response = refusal(500, f"unexpected error: {type(error).__name__}")
        REQUESTS.labels(response.status_code).inc()
        SECONDS.observe(time.perf_counter() - start)
        return response

    async def health(self) -> Response:
        """Whether the service takes requests: 200, or 503 with the reason why not."""
        reason = self._not_ready()
        return refusal(503, reason) if reason else JSONResponse({"detail": "ready"})

    async def metrics(self) -> Response:
        """Figures for Prometheus."""
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

    def _not_ready(self) -> str | None:
        if self.stopping:
            return "the service is stopping"
        if not self.batcher.ready.done():
            return "the service is starting"
        return self.batcher.broken

    async def _answer(self, request: Request, format: Format) -> Response:
        reason = self._not_ready()
        if reason is None and self.unanswered == self.args.queue:
            reason = f"{self.unanswered} requests have no answer yet, the most at once (--queue)"
        if reason:
            await discard_body(request)
            raise HTTPException(503, reason, {"Retry-After": "1"})
        self.unanswered += 1
        try:
            return await self._segmented(request, format)
        finally:
            self.unanswered -= 1

    async def _segmented(self, request: Request, format: Format) -> Response:
        in_pool = partial(asyncio.get_running_loop().run_in_executor, self._pool)
        body = await read_body(request, self.args.max_bytes)
        try:
            image = await in_pool(decode_picture, body, "the picture", self.args.max_pixels)
        except InputError as error:
            raise HTTPException(422, str(error)) from None
        labels = await unless_client_gone(request, self.batcher.submit(image))
        return await in_pool(encoded, format, image, labels, self.dataset)


def refusal(status: int, detail: str, headers: Mapping[str, str] | None = None) -> Response:
    """An answer that says why there is no better one."""
    return JSONResponse({"detail": detail}, status, headers)


async def read_body(request: Request, most: int) -> bytes:
    """The body of a request, or the content of the only file of a form.

    Raises:
        HTTPException: the body has more than ``most`` bytes, or a form is damaged or has not just
            one file.
        ClientDisconnect: the client went away.
    """
    received = 0

    async def receive() -> Message:
        nonlocal received
        message = await request.receive()
        received += len(message.get("body", b""))
        if received > most:
            if message["more_body"]:
                await discard_body(request)
            raise HTTPException(413, f"a request has at most {most} bytes (--max-bytes)")
        return message

    limited = Request(request.scope, receive)
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        return await limited.body()
    try:
        async with limited.form() as form:
            files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
            if len(files) != 1:
                raise HTTPException(422, f"expected a form with 1 file, got {len(files)} files")
            return await files[0].read()
    except FormParserError as error:  # newer versions of Starlette answer with 400 themselves
        raise HTTPException(400, f"the form is damaged ({error})") from None


async def discard_body(request: Request) -> None:
    """Receive the rest of a body: many clients look for an answer only after they sent all."""
    left = DISCARDED
    while left > 0:
        message = await request.receive()
        if not message.get("more_body"):
            return
        left -= len(message["body"])


async def unless_client_gone(request: Request, labels: "Future[np.ndarray]") -> np.ndarray:
    """Wait for labels. Cancel them if the client goes away or if this waiting is cancelled.

    Raises:
        ClientDisconnect: the client went away.
        NoLabelsError: the network has no labels.
    """
    done = asyncio.wrap_future(labels)
    gone = asyncio.ensure_future(request.receive())  # the whole body was received before
    try:
        await asyncio.wait([done, gone], return_when=asyncio.FIRST_COMPLETED)
        if not done.done():
            raise ClientDisconnect
        return done.result()
    finally:
        done.cancel()
        gone.cancel()


def encoded(format: Format, image: np.ndarray, labels: np.ndarray, dataset: Dataset) -> Response:
    """The answer for a picture, uint8 RGB [H, W, 3], with class indices, uint8 [H, W]."""
    if format != "json":
        picture = labels if format == "labels" else overlay(image, labels, dataset)
        return Response(encode_png(picture), media_type="image/png")
    names = class_names(dataset)
    shares = np.bincount(labels.ravel(), minlength=len(names)) / labels.size
    classes = [
        {"index": index, "name": name, "share": share}
        for index, (name, share) in enumerate(zip(names, shares.tolist(), strict=True))
    ]
    height, width = labels.shape
    return JSONResponse({"width": width, "height": height, "classes": classes})


class Server(uvicorn.Server):
    """Uvicorn without its handlers of signals: they would end the process with another code."""

    capture_signals = contextlib.nullcontext


async def serve(service: Service, listening: socket.socket) -> int:
    """Serve until a signal comes, and then until all accepted requests have their answers.

    A second signal ends the process at once.

    Returns:
        The number of requests that got no answer within ``--grace-s``.

    Raises:
        Exception: the network cannot be loaded, or fails with a first picture.
    """
    loop, signalled = asyncio.get_running_loop(), asyncio.Event()

    def on_signal(number: int) -> None:
        if signalled.is_set():
            os._exit(128 + number)  # as a shell reports a process that a signal has ended
        signalled.set()

    for each in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(each, on_signal, each)
    config = uvicorn.Config(service.app(), log_level="warning", lifespan="off")
    server = Server(config)
    serving = asyncio.create_task(server.serve([listening]))
    ready = asyncio.wrap_future(service.batcher.ready)
    stop = asyncio.create_task(signalled.wait())
    await asyncio.wait([ready, stop], return_when=asyncio.FIRST_COMPLETED)
    if ready.done():
        ready.result()
        command.say("The service is ready.")
    await stop
    service.stopping = True
    end = loop.time() + service.args.grace_s
    while service.unanswered and loop.time() < end:
        await asyncio.sleep(0.02)
    unanswered = service.unanswered
    # The last answers may still be on their way.
    config.timeout_graceful_shutdown = max(1, round(end - loop.time()))
    server.should_exit = True
    await serving
    return unanswered


def load(args: Namespace, chosen: Chosen, device: torch.device) -> Predictor:
    """The network of the command line, fused where it can be."""
    torch.set_num_threads(args.threads)
    network = ready_network(
        chosen.name,
        read_chosen(args.ckpt, chosen.name),
        device,
        args.precision,
        num_classes=chosen.num_classes,
    )
    return Predictor(
        network,
        replace(chosen.protocol, base_scale=args.scale) if args.scale else chosen.protocol,
        precision=args.precision,
        batch_size=args.batch_size,
        cuda_graphs=True,
    )


def listen(host: str, port: int) -> socket.socket:
    """A socket to which clients can connect already; they wait for ``serve``.

    Raises:
        InputError: the address cannot be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise InputError(
            f"--host {host} --port {port}: cannot be used ({error.strerror}); expected an address "
            "of this computer and a free port"
        ) from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    return command.answer(lambda: _main(make_parser().parse_args(arguments)))


def _main(args: Namespace) -> int:
    device = open_device(args.device, [args.precision])
    chosen = choose(args.ckpt, args.model)
    listening = listen(args.host, args.port)
    port = listening.getsockname()[1]
    command.say(f"Listening on http://{args.host}:{port} (Ctrl-C ends the service)")
    batcher = Batcher(partial(load, args, chosen, device), args.wait_ms / 1000, note_batch)
    unanswered = asyncio.run(serve(Service(batcher, chosen.dataset, args), listening))
    if unanswered:
        command.complain(f"error: {unanswered} requests have no answer (--grace-s)")
    os._exit(1 if unanswered else 0)  # without waiting for the network, which may still run


def note_batch(images: int, seconds: float) -> None:
    """Count a batch of the network in the metrics."""
    BATCHES.observe(images)
    BUSY.inc(seconds)


def make_parser() -> command.Parser:
    """The parser of all options."""
    parser = command.Parser(
        prog="python examples/serve.py",
        description="Segment pictures over HTTP: POST a JPEG or PNG file to /segment.",
        epilog="models: emanet-triton eval --list",
    )
    parser.add_argument("--ckpt", required=True, help="a checkpoint, or the name of a model")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="default: fp32")
    for name, kind, default, meaning in OPTIONS:
        shown = "" if default is None else f"; default: {default}"
        parser.add_argument(name, type=kind, default=default, help=meaning + shown)
    return parser


if __name__ == "__main__":
    command.run(main)
