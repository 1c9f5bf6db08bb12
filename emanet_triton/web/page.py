"""The page, made of gradio's components. Importing this module does not import gradio."""

import asyncio
import itertools
import os
import traceback
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from emanet_triton.data.overlay import ALPHA, overlay
from emanet_triton.data.picture import read_picture
from emanet_triton.data.png import write_png
from emanet_triton.errors import InputError, describe
from emanet_triton.models.zoo import DEMO, list_models
from emanet_triton.web import texts
from emanet_triton.web.desk import Desk
from emanet_triton.web.segmenter import Choice, Result, Segmenter, precisions

HOST = "127.0.0.1"
SINGLE, MS_FLIP = "single view", "ms+flip"
PROTOCOL, OWN = "the protocol's", "the picture's own"
_FORGET = 3600  # seconds after which the last result of a page is forgotten

# No font, script, picture or request of another host: gradio 6.0 asks for a script of one.
_POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'"
)
_CSS = """
.gradio-container { max-width: 1180px !important; }
#note p { margin: 0; font-size: var(--text-sm); color: var(--body-text-color); }
#classes .image-frame { width: 100%; }
#classes img { width: 100%; max-height: 75vh; object-fit: contain; }
#summary p { margin: 0; }
#summary .problem { color: var(--error-text-color) !important; overflow-wrap: anywhere; }
#areas ul { list-style: none; margin: 0; padding: 0; columns: 2 230px; column-gap: 36px; }
#areas li { display: flex; gap: 10px; align-items: center; break-inside: avoid; padding: 2px 0; }
#areas i { width: 20px; height: 14px; border: 1px solid #8888; }
#areas span { flex: 1; }
#areas b { font-weight: normal; font-variant-numeric: tabular-nums; }
"""
_FONT = ("system-ui", "sans-serif")
_MONOSPACE = ("ui-monospace", "monospace")

Shown = tuple[Result | None, str | None, str, str]  # result, path of overlay, summary, list


class Overlays:
    """The latest overlays as PNG files. The browser has loaded the older ones, or wants none.

    Args:
        folder: for the files.
        kept: how many files stay.
    """

    def __init__(self, folder: Path, kept: int = 32) -> None:
        self._folder, self._kept = folder, kept
        self._numbers = itertools.count(1)
        self._files: deque[Path] = deque()

    def draw(self, result: Result, alpha: float) -> str:
        """Draw the overlay of a result, without running the network. Return the file's path.

        Args:
            result: whose image and labels to draw.
            alpha: opacity of the classes' colours, 0 to 1.

        Raises:
            InputError: the file cannot be written.
        """
        picture = overlay(result.image, result.labels, result.dataset, alpha=alpha, legend=False)
        path = self._folder / f"classes_{next(self._numbers)}.png"
        write_png(path, picture)
        self._files.append(path)
        while len(self._files) > self._kept:
            self._files.popleft().unlink(missing_ok=True)
        return str(path)


def answer(
    segmenter: Segmenter, overlays: Overlays, path: Path | None, chosen: Choice, alpha: float
) -> Shown:
    """Segment the picture in a file, for the page.

    Args:
        segmenter: which computes.
        overlays: gets the picture to show.
        path: of the picture, or None if the page has none.
        chosen: by the user.
        alpha: opacity of the classes' colours, 0 to 1.

    Returns:
        The result, the path of its overlay, the summary and the list of classes (both HTML).
        After an error the summary is its message, the first two are None and the list is empty.
    """
    try:
        if path is None:
            raise InputError("there is no picture; drop one, or choose a drawn scene")
        result = segmenter(read_picture(path), chosen)
        drawn = overlays.draw(result, alpha)
    except InputError as error:
        # The user knows the name of the file, and not the folder that gradio has put it into.
        message = str(error).replace(str(path), path.name) if path else str(error)
        return None, None, texts.problem(message), ""
    except Exception as error:  # the page stays usable whatever a device or a library raises
        traceback.print_exc()
        return None, None, texts.problem(describe(error)), ""
    listed = texts.area_list(texts.areas(result.labels, result.dataset))
    return result, drawn, texts.summary(result, str(segmenter.device)), listed


def serve(
    segmenter: Segmenter, desk: Desk, port: int, folder: Path, examples: list[Path]
) -> Callable[[], None]:
    """Serve the page on ``HOST`` by threads of gradio's.

    Args:
        segmenter: which computes.
        desk: where the page asks for results.
        port: on which no other program listens.
        folder: for uploaded pictures and results.
        examples: pictures to choose from; the page shows the first one.

    Returns:
        A function that ends the serving.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # gradio reads it when it is imported
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    # gradio calls its own server once, which a proxy could not reach.
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = ",".join(
        filter(None, (os.environ.get("no_proxy") or os.environ.get("NO_PROXY"), HOST))
    )
    import gradio
    from starlette.middleware import Middleware

    page = _page(segmenter, Overlays(folder), desk, examples)
    page.launch(
        server_name=HOST,
        server_port=port,
        share=False,
        prevent_thread_lock=True,
        quiet=True,
        footer_links=[],
        ssr_mode=False,
        mcp_server=False,
        theme=_theme(gradio),
        css=_CSS,
        app_kwargs={"middleware": [Middleware(_OwnHostOnly)]},
    )
    return lambda: page.close(verbose=False)


def _theme(gradio: Any) -> Any:
    """The fonts of the system, and explanations that are dark enough to read."""
    theme = gradio.themes.Default(primary_hue="blue", font=_FONT, font_mono=_MONOSPACE)
    return theme.set(
        block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300"
    )


class _OwnHostOnly:
    """Tells the browser to ask no other host for anything (ASGI middleware)."""

    def __init__(self, app: Callable) -> None:
        self._app = app

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        async def send_with_policy(message: dict) -> None:
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", _POLICY.encode())
                message = {**message, "headers": [*message["headers"], policy]}
            await send(message)

        await self._app(scope, receive, send_with_policy)


def _page(segmenter: Segmenter, overlays: Overlays, desk: Desk, examples: list[Path]) -> Any:
    """The components and what happens when they are used."""
    import gradio

    async def segment(
        path: Path | None, model: str, precision: str, views: str, size: str, alpha: float
    ) -> Shown:
        chosen = Choice(model, precision, ms_flip=views == MS_FLIP, own_size=size == OWN)
        return await asyncio.wrap_future(desk.ask(answer, segmenter, overlays, path, chosen, alpha))

    def redraw(result: Result | None, alpha: float) -> Any:
        return gradio.skip() if result is None else overlays.draw(result, alpha)

    with gradio.Blocks(title="EMANet", analytics_enabled=False) as page:
        gradio.Markdown("## EMANet: a class for every pixel of a street picture")
        result = gradio.State(time_to_live=_FORGET)
        with gradio.Row():
            with gradio.Column(scale=2, min_width=300):
                picture = _picture(gradio, examples)
                start = gradio.Button("Segment", variant="primary", elem_id="start")
                model = gradio.Dropdown(list_models(), value=DEMO, label="Model")
                note = gradio.Markdown(texts.model_note(DEMO), elem_id="note")
                names = precisions(segmenter.device)
                precision = gradio.Radio(names, value=names[0], label="Precision")
                views = gradio.Radio(
                    [SINGLE, MS_FLIP],
                    value=SINGLE,
                    label="Views",
                    info="ms+flip averages several scales, each also mirrored. It takes longer.",
                )
                size = gradio.Radio([PROTOCOL, OWN], value=PROTOCOL, label="Size for the network")
            with gradio.Column(scale=3, min_width=300):
                shown = gradio.Image(
                    label="Classes",
                    interactive=False,
                    buttons=["download", "fullscreen"],
                    elem_id="classes",
                )
                alpha = gradio.Slider(0, 1, ALPHA, step=0.05, label="Opacity", elem_id="opacity")
                summary = gradio.HTML(elem_id="summary")
                listed = gradio.HTML(elem_id="areas")
        start.click(
            segment,
            [picture, model, precision, views, size, alpha],
            [result, shown, summary, listed],
            concurrency_limit=1,
            show_progress_on=[shown],
            api_visibility="private",
        )
        alpha.input(
            redraw,
            [result, alpha],
            shown,
            trigger_mode="always_last",
            show_progress="hidden",
            api_visibility="private",
        )
        model.change(texts.model_note, model, note, queue=False, api_visibility="private")
    return page


def _picture(gradio: Any, examples: list[Path]) -> Any:
    """The component that takes a picture; its value is the path of the file."""
    picture = gradio.Image(
        str(examples[0]),
        label="Picture",
        sources=["upload", "webcam", "clipboard"],
        image_mode=None,
        height=260,
        elem_id="picture",
    )
    # gradio's own decoder gives no reason for a file that it cannot read, and other pixels than
    # the evaluation's.
    picture.preprocess = lambda file: None if file is None else Path(file.path)
    # gradio.Examples would make a new component, with gradio's own decoder.
    paths = [[str(path)] for path in examples]
    scenes = gradio.Dataset(
        label="Drawn scenes", components=["image"], samples=paths, elem_id="scenes"
    )
    scenes.click(
        lambda sample: sample[0], scenes, picture, show_progress="hidden", api_visibility="private"
    )
    return picture
