"""The folder of a training: its checkpoints, and the state from which it can go on."""

import contextlib
import io
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emanet_triton.errors import InputError, first_line
from emanet_triton.files import write_output
from emanet_triton.models.checkpoint_files.safetensors_file import write_safetensors
from emanet_triton.models.description import Description

LAST, BEST = "last.safetensors", "best.safetensors"
KEPT = "iter_{}.safetensors"  # the weights after so many iterations
STATE = "state.pth"
_EXPECTED = "expected the state of a training by this command"
_FORM = 1  # of the state's file; increase it when an older one cannot be read


@dataclass(frozen=True)
class Folder:
    """The folder that gets all results of a training.

    Every file is written whole, so a killed process leaves the earlier one. Only ``STATE`` is read
    again; the checkpoints beside it are for people and for ``--ckpt``.

    Attributes:
        path: of the folder.
        trained: describes the weights; ``info`` gets the iteration and the scores.
    """

    path: Path
    trained: Description

    def going_on(self, init: str) -> "Folder":
        """The folder of a training that began with the initial weights ``init``."""
        info = {**self.trained.info, "init": init}
        return replace(self, trained=replace(self.trained, info=info))

    def write_weights(
        self, name: str, weights: Mapping[str, Tensor], info: Mapping[str, Any]
    ) -> None:
        """Write a checkpoint that every ``--ckpt`` of this package takes.

        Raises:
            InputError: the file cannot be written.
        """
        trained = replace(self.trained, info={**self.trained.info, **info})
        on_cpu = {key: value.detach().cpu() for key, value in weights.items()}
        write_output(self.path / name, write_safetensors(on_cpu, trained.metadata()))

    def write_state(self, state: Mapping[str, Any]) -> None:
        """Write the state from which the training can go on.

        Raises:
            InputError: the file cannot be written.
        """
        content = io.BytesIO()
        torch.save({"form": _FORM, **state}, content)
        write_output(self.path / STATE, content.getvalue())

    def read_state(self) -> dict[str, Any]:
        """The state that ``write_state`` has written, on the CPU. No code in the file is executed.

        Raises:
            InputError: there is none, or it is damaged.
        """
        path = self.path / STATE
        require_state(self.path)
        try:
            _check_sums(path)
            state = torch.load(path, map_location="cpu", weights_only=True)
        except MemoryError:
            raise
        except Exception as error:  # of many kinds, because damage leads the readers anywhere
            raise InputError(f"{path}: cannot be read, it is damaged; {_EXPECTED}") from error
        if not isinstance(state, dict) or state.get("form") != _FORM:
            raise InputError(f"{path}: is of another kind or version; {_EXPECTED}")
        return state

    @contextlib.contextmanager
    def refusing_incomplete(self) -> Iterator[None]:
        """Turn the errors of a state that lacks something into an InputError.

        Raises:
            InputError: see above.
        """
        try:
            yield
        except InputError:
            raise
        except (LookupError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise InputError(
                f"{self.path / STATE}: is incomplete or of another network "
                f"({first_line(error)}); {_EXPECTED}"
            ) from error


def _check_sums(path: Path) -> None:
    """Raise an error if a part of an archive has another checksum: ``torch.load`` checks none."""
    with zipfile.ZipFile(path) as archive:
        if part := archive.testzip():
            raise ValueError(f"{part} has another checksum")


def require_state(path: Path) -> None:
    """Raise InputError if a folder lacks the state of a training.

    Raises:
        InputError: see above.
    """
    if not (path / STATE).is_file():
        raise InputError(f"--resume: {path / STATE}: no such file; {_EXPECTED}")


def refuse_training(path: Path) -> None:
    """Raise InputError if a folder holds a training.

    Raises:
        InputError: see above.
    """
    if any(any(path.glob(name)) for name in (STATE, LAST, BEST, KEPT.format("*"))):
        raise InputError(
            f"--out {path}: holds a training; expected --resume to go on with it, or another folder"
        )
