"""``python -m emanet_triton.web``: a local page that segments pictures in the browser."""

import argparse
import importlib.util
import socket
import tempfile
import webbrowser
from collections.abc import Sequence
from pathlib import Path

import torch

from emanet_triton.command import Parser, answer, program, run, say
from emanet_triton.cores import default_threads
from emanet_triton.data.png import write_png
from emanet_triton.data.scenes.generate import VAL_SEEDS, generate_scene
from emanet_triton.errors import InputError
from emanet_triton.inference.build import open_device
from emanet_triton.versions import package_version
from emanet_triton.web import page
from emanet_triton.web.desk import Desk
from emanet_triton.web.segmenter import Segmenter

OLDEST = 6  # the first version of gradio that has all that the page uses
EXAMPLES = 3  # pictures to choose from
_MOST_PORT = 2**16 - 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    interrupted = "the page is closed"
    return answer(lambda: _main(make_parser().parse_args(arguments)), interrupted)


def make_parser() -> Parser:
    """The parser of all options."""
    parser = Parser(
        prog=program("demo", module="web"),
        description="Open a page on this computer that segments pictures. Ctrl-C ends it.",
    )
    parser.add_argument(
        "--port", type=_port, default=0, metavar="N", help="default: 0, which takes a free port"
    )
    parser.add_argument(
        "--browser",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="open the page in the browser",
    )
    parser.add_argument("--device", help="default: cuda if there is a GPU, else cpu")
    return parser


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > _MOST_PORT:
        raise argparse.ArgumentTypeError(f"expected a number of 0 to {_MOST_PORT}, got '{text}'")
    return int(text)


def _main(args: argparse.Namespace) -> int:
    _require_gradio()
    segmenter, desk = Segmenter(open_device(args.device, ())), Desk()
    port = _free_port(args.port)
    torch.set_num_threads(default_threads())
    with tempfile.TemporaryDirectory(prefix="emanet_triton_") as folder:
        examples = _draw_scenes(Path(folder))
        try:
            close = page.serve(segmenter, desk, port, Path(folder), examples)
        except OSError:
            _free_port(port)  # says so if another program took the port meanwhile
            raise
        try:
            address = f"http://{page.HOST}:{port}/"
            say(f"The page is at {address} (Ctrl-C ends it).")
            if args.browser:
                webbrowser.open(address)
            desk.work()
        finally:
            close()
    return 0


def _draw_scenes(folder: Path) -> list[Path]:
    """Example pictures, which the demonstration model was not trained on."""
    paths = [folder / f"scene_{number}.png" for number in range(1, EXAMPLES + 1)]
    for path, seed in zip(paths, VAL_SEEDS[:EXAMPLES], strict=True):
        write_png(path, generate_scene(seed)[0])
    return paths


def _require_gradio() -> None:
    """Raise InputError if gradio is missing or too old."""
    command = "pip install '.[web]'"
    if importlib.util.find_spec("gradio") is None:
        raise InputError(f"the page needs the package gradio; install it: {command}")
    version = package_version("gradio")
    if version.split(".")[0].isdecimal() and int(version.split(".")[0]) < OLDEST:
        raise InputError(f"gradio {version} is too old for the page; update it: {command}")


def _free_port(port: int) -> int:
    """The port itself, or a free one for 0.

    Raises:
        InputError: the port cannot be used.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((page.HOST, port))
        except OSError as error:
            raise InputError(
                f"--port {port}: cannot be used ({error.strerror}); expected a free port, or 0"
            ) from None
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    run(main)
