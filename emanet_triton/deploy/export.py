"""``export``: a network as a file that other programs run."""

import importlib.util
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from emanet_triton.deploy.formats import (
    FORMATS,
    INSTALL,
    SAFETENSORS,
    Format,
    notes,
    refusal,
    require,
)
from emanet_triton.deploy.parts import LOGITS, PARTS
from emanet_triton.deploy.program import (
    DTYPES,
    OPERATORS,
    STANDARD,
    Request,
    default_size,
    least_side,
)
from emanet_triton.deploy.verify import Check, checks
from emanet_triton.errors import InputError, describe
from emanet_triton.files import require_writable, write_output
from emanet_triton.inference.views import Size
from emanet_triton.kernels.checks import check_choice
from emanet_triton.models.description import Description
from emanet_triton.models.network import FusedNetwork, Network
from emanet_triton.models.protocol import Protocol


@dataclass(frozen=True)
class Exported:
    """What ``export`` has written.

    Attributes:
        files: the file, and for OpenVINO a second one with the weights.
        checks: comparisons of the file's results with this package's.
        notes: sentences for the user.
    """

    files: tuple[Path, ...]
    checks: tuple[Check, ...]
    notes: tuple[str, ...]


def export(
    model: nn.Module,
    file: str | Path,
    *,
    to: str,
    part: str = LOGITS,
    precision: str = "fp32",
    size: Size | None = None,
    batch: int | None = None,
    dynamic: bool = False,
    operators: str = STANDARD,
    protocol: Protocol | None = None,
    about: Description | None = None,
    check: bool = True,
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda line: None,
) -> Exported:
    """Write a network as a file that other programs run, and compare its results with ours.

    Args:
        model: an EMANet in evaluation mode, not a fused one. Its device is the file's.
        file: to write: ``*.onnx``, ``*.xml`` for OpenVINO, ``*.pt2`` for PyTorch,
            ``*.safetensors`` for weights.
        to: ``"onnx"``: operators of ONNX alone, opset 18; ``"openvino"``; ``"torch"``: a program
            of ``torch.export``; ``"aoti"``: a package that AOTInductor has compiled for this kind
            of device; ``"safetensors"``: the weights alone, for this package.
        part: ``"logits"``: normalised images, float32 [B, 3, H, W] → logits, float32
            [B, classes, H / stride, W / stride]; ``"labels"``: normalised images → labels, uint8
            [B, H, W]; ``"image-to-labels"``: RGB images, uint8 [B, H, W, 3] → labels, uint8
            [B, H, W], with all resizes. Without ``batch`` and ``dynamic`` the last takes one image
            [H, W, 3] and returns [H, W].
        precision: of weights and activations: ``"fp32"``, ``"fp16"`` or ``"bf16"``. Inputs and
            logits are float32 all the same, and so is the EM attention.
        size: (height, width) of the input in pixels; by default the size into which the protocol
            fits an image, for the logits of sliding windows the size of a window. If images keep
            their size, the default is, for the logits, the size to which the protocol pads them;
            else a file of one size needs ``size``.
        batch: the number of images at once; by default one.
        dynamic: leave batch and size free.
        operators: ``"standard"``: PyTorch's own; ``"own"``, for ``to="torch"``: this package's,
            which are faster. The program that loads the file must then import emanet_triton, and
            run on the same kind of device.
        protocol: how images are resized and cut into windows; by default the model's.
        about: the model, for the file's metadata; by default ``model.description``.
        check: whether to compare results. The file is not kept if they differ.
        overwrite: replace an existing file.
        progress: gets a line of text before each step, and after each comparison.

    Raises:
        InputError: the file cannot be written, exists, or computes something else than the model;
            the combination of options is not possible; the model was changed; or a package is
            missing.
        ValueError: an argument is not as above, or the model is in training mode.
    """
    file = Path(file)
    for name, value, choices in (
        ("to", to, FORMATS),
        ("part", part, PARTS),
        ("precision", precision, DTYPES),
        ("operators", operators, OPERATORS),
    ):
        check_choice(name, value, choices)
    if not isinstance(model, Network) or isinstance(model, FusedNetwork):
        raise ValueError(f"export takes an EMANet that is not fused, got {type(model).__name__}")
    if model.training:
        raise ValueError("the model is in training mode; call model.eval() first")
    _check_batch(batch, dynamic)
    protocol = protocol or model.protocol
    if size is None:
        size = size_without_option(protocol, to, part, dynamic)
    size = _checked_size(size, least_side(model))
    about = about or model.description
    request = Request(model, protocol, part, precision, size, batch, dynamic, operators, about)
    if refused := refusal(to, request):
        raise InputError(refused)
    format_ = FORMATS[to]
    _check_names(format_, file, overwrite)
    for package in format_.packages:
        require(package)
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder, file.name)
        _write(format_, request, written, file, progress)
        done, unchecked = _checked(format_, request, written, file, check, progress)
        _check_names(format_, file, overwrite)  # minutes may have passed
        for each in format_.files(file):
            write_output(each, (written.parent / each.name).read_bytes())
    return Exported(format_.files(file), done, (*unchecked, *notes(to, request)))


def size_without_option(protocol: Protocol, to: str, part: str, dynamic: bool) -> Size:
    """The ``size`` of ``export`` if nobody gives one.

    Raises:
        InputError: there is none.
    """
    return default_size(protocol, part, any_size=dynamic or to == SAFETENSORS)


def _check_batch(batch: object, dynamic: bool) -> None:
    if batch is None:
        return
    if dynamic:
        raise ValueError("batch is the number of images of a file that is not dynamic")
    if type(batch) is not int or batch < 1:
        raise ValueError(f"batch must be an int of at least 1, got {batch!r}")


def _checked_size(size: object, least: int) -> Size:
    if not isinstance(size, tuple) or [type(side) for side in size] != [int, int]:
        raise ValueError(f"size must be (height, width), two ints, got {size!r}")
    if min(size) < least:
        sides = "x".join(map(str, size))
        raise InputError(f"a size of {sides} pixels is too small; expected at least {least}")
    return size


def _check_names(format_: Format, file: Path, overwrite: bool) -> None:
    """Refuse a name of another kind of file, files that exist, and folders that cannot be written.

    Raises:
        InputError: there is such a name, file or folder.
    """
    if file.suffix != format_.suffix:
        raise InputError(f"{file}: expected a name that ends in {format_.suffix}")
    for each in format_.files(file):
        if each.exists() and not overwrite:
            raise InputError(f"{each}: exists already; it is replaced only on request (--force)")
        require_writable(each)


def _write(
    format_: Format, request: Request, path: Path, named: Path, progress: Callable[[str], None]
) -> None:
    progress(f"writing {named}")
    try:
        format_.write(request, path)
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{named}: cannot be written ({error.strerror})") from error
    except Exception as error:  # exporters and compilers raise many types
        raise InputError(f"{named}: cannot be made ({describe(error)})") from error


def _checked(
    format_: Format,
    request: Request,
    path: Path,
    named: Path,
    check: bool,
    progress: Callable[[str], None],
) -> tuple[tuple[Check, ...], tuple[str, ...]]:
    """Compare, and return the comparisons, or a sentence that says why there are none.

    Raises:
        InputError: the file does not run, or its results are wrong.
    """
    if not check:
        return (), ("the results were not compared",)
    runtime = format_.runtime
    if runtime and importlib.util.find_spec(runtime) is None:
        return (), (f"the results were not compared: {runtime} is missing ({INSTALL})",)
    progress("comparing results")
    done = []
    for found in checks(format_, path, named, request):
        progress(str(found))
        done.append(found)
        if not found.passed:
            raise InputError(f"{named}: was not kept, because its results are wrong: {found}")
    return tuple(done), ()
