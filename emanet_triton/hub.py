"""EMANets on the Hugging Face Hub. This module needs huggingface_hub, the extra ``hub``.

A folder or repository holds three files:

- ``model.safetensors``: the weights, with the description in the metadata, so that every ``--ckpt``
  and ``create_model(checkpoint=...)`` take the file alone.
- ``config.json``: the description, from which the network is built.
- ``README.md``: the model card.
"""

import copy
import hashlib
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch

from emanet_triton.data.overlay import class_names
from emanet_triton.errors import InputError, first_line
from emanet_triton.files import is_folder, require_folder, write_output
from emanet_triton.models.checkpoint import Checkpoint, read_checkpoint
from emanet_triton.models.checkpoint_files.safetensors_file import write_safetensors
from emanet_triton.models.chosen import choose, read_chosen
from emanet_triton.models.description import Description
from emanet_triton.models.emanet import EMANet, FusedEMANet
from emanet_triton.models.entries import SOURCES
from emanet_triton.models.loading import load_into
from emanet_triton.models.zoo import find_entry

try:
    from huggingface_hub import ModelCard, PyTorchModelHubMixin, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError
except ImportError as error:
    raise ImportError(
        "emanet_triton.hub needs the package huggingface_hub: pip install '.[hub]'"
    ) from error

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_FIGURES = ("iteration", "mIoU")  # in what a training says of a checkpoint
# An interrupted download raises an error of the HTTP client, which differs between versions of
# huggingface_hub. The class of all its errors is a base of this one.
_DOWNLOAD_ERRORS: tuple[Any, ...] = (*HfHubHTTPError.__bases__, OSError, ValueError)
_PAPER = "https://arxiv.org/abs/1907.13426"


class HubEMANet(
    EMANet,
    PyTorchModelHubMixin,
    library_name="emanet_triton",
    pipeline_tag="image-segmentation",
    paper_url=_PAPER,
    tags=["emanet", "image-segmentation", "semantic-segmentation"],
):
    """An EMANet that knows its classes, with the methods of the Hub.

    ``save_pretrained(folder)`` writes the three files, and ``push_to_hub("OWNER/NAME")`` uploads
    them; huggingface_hub's ``PyTorchModelHubMixin`` documents both. A ``README.md`` that is there
    already stays. ``fuse`` and ``segment`` take this network as they take an ``EMANet``.

    Args:
        config: the description: model, classes and protocol.

    Raises:
        InputError: the zoo has no such model, it is no EMANet, or there are not 1 to 255 classes.
    """

    def __init__(self, config: Description) -> None:
        entry = find_entry(config.model)
        if entry.network is not EMANet:
            raise InputError(f"expected an EMANet, but {config.model} is another network")
        if not 1 <= len(config.classes) <= 255:
            raise InputError(f"expected 1 to 255 classes, got {len(config.classes)}")
        super().__init__(entry.architecture, config.protocol, len(config.classes))
        self.describe(config)
        self._as_read: str | None = None  # a digest of the weights of the file

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: str | Path,
        model: str | None = None,
        data: str | Path | None = None,
    ) -> Self:
        """Read a checkpoint, in evaluation mode, on the CPU and in float32.

        Args:
            checkpoint: a checkpoint file, or a model of the zoo: then its published checkpoint,
                which is downloaded once.
            model: the name of the model. Published files and files of emanet-triton train need
                none.
            data: a file ``*.toml`` that describes the data set, if its classes are not the model's
                own and the checkpoint does not say them.

        Raises:
            InputError: the arguments contradict each other, or a file cannot be read or used.
        """
        chosen = choose(str(checkpoint), model, None if data is None else Path(data))
        loaded = read_chosen(str(checkpoint), chosen.name)
        description = _description_in(loaded)
        config = Description(
            model=chosen.name,
            classes=class_names(chosen.dataset),
            protocol=chosen.protocol,
            dataset=chosen.dataset.description,
            info=_figures(description) | {"file": loaded.path.name, "sha256": loaded.sha256},
        )
        network = cls._on_cpu(config)
        network._load(loaded)
        return network

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Self:
        """Read a folder of ``save_pretrained`` or a repository, in evaluation mode, on the CPU.

        The weights are read as every checkpoint: no code in the files is executed, and all weights
        must fit.

        Args:
            pretrained_model_name_or_path: the folder, or the repository's name: "OWNER/NAME".
            options: of ``huggingface_hub.hf_hub_download``, such as ``revision`` and ``token``.

        Raises:
            InputError: a file is missing, damaged, cannot be downloaded, or does not fit the other.
        """
        source = pretrained_model_name_or_path
        path = _file_of(source, CONFIG, options)
        try:
            config = Description.from_json(path.read_text(encoding="utf-8"))
            network = cls._on_cpu(config)
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from None
        except ValueError as error:  # InputError, or no UTF-8
            raise InputError(f"{path}: {error}") from None
        checkpoint = read_checkpoint(_file_of(source, WEIGHTS, options))
        if _description_in(checkpoint) not in (None, config):
            raise InputError(f"{checkpoint.path}: describes another model than {path}")
        network._load(checkpoint)
        return network

    @classmethod
    def _on_cpu(cls, config: Description) -> Self:
        """The network with random weights, in float32 and in evaluation mode."""
        with torch.inference_mode(False), torch.device("cpu"):
            return cls(config).float().eval()

    def _load(self, checkpoint: Checkpoint) -> None:
        load_into(self, checkpoint)
        self._as_read = self._digest()

    def _weights(self, metadata: dict[str, str]) -> bytes:
        weights = {key: value.cpu() for key, value in self.state_dict().items()}
        return write_safetensors(weights, metadata)

    def _digest(self) -> str:
        return hashlib.sha256(self._weights({})).hexdigest()

    @property
    def description(self) -> Description:
        """What ``config.json`` says: nothing of the file that was read if its weights changed."""
        noted = super().description
        assert noted is not None  # ``__init__`` notes it
        same = self._as_read is None or self._as_read == self._digest()
        return noted if same else replace(noted, info={})

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> str | None:
        """Write the three files; the options are those of the mixin.

        Raises:
            InputError: the folder or a file cannot be written.
        """
        require_folder(Path(save_directory))
        return super().save_pretrained(save_directory, **options)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the three files; the options are those of the mixin. Returns the address."""
        own = options.pop("model_card_kwargs", None) or {}
        return super().push_to_hub(repo_id, model_card_kwargs={"repo_id": repo_id} | own, **options)

    def _save_pretrained(self, save_directory: Path) -> None:
        description = self.description
        write_output(save_directory / WEIGHTS, self._weights(description.metadata()))
        write_output(save_directory / CONFIG, description.to_json(indent=2).encode())

    def generate_model_card(
        self, repo_id: str = "OWNER/NAME", license: str | None = None
    ) -> ModelCard:
        """The model card.

        Args:
            repo_id: the repository's name, for the example.
            license: of the weights. The default is what their project says, for the zoo's, and
                none for others.
        """
        description = self.description
        data = copy.deepcopy(self._hub_mixin_info.model_card_data)
        data.license = license or _license(description)
        text = _card(description, repo_id)
        return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")

    def fused_form(self, dtype: torch.dtype, channels_last: bool) -> FusedEMANet:
        # An EMANet refuses subclasses, which may compute something else. This one does not.
        if type(self) is not HubEMANet:
            raise ValueError(f"fuse takes an EMANet, got {type(self).__name__}")
        network = EMANet.__new__(EMANet)
        vars(network).update(vars(self))  # the same modules, hooks and settings
        return network.fused_form(dtype, channels_last)


def _file_of(source: str | Path, name: str, options: dict[str, Any]) -> Path:
    """A file of a folder, or of a repository, from which it is downloaded once."""
    if is_folder(source):
        return Path(source, name)
    try:
        return Path(hf_hub_download(str(source), name, **options))
    except _DOWNLOAD_ERRORS as error:
        raise InputError(
            f"{source}: there is no such folder, and {name} of a repository of this name cannot be "
            f"downloaded ({first_line(error)})"
        ) from error


def _description_in(checkpoint: Checkpoint) -> Description | None:
    """The description in a checkpoint, if it has one.

    Raises:
        InputError: it is broken.
    """
    try:
        return Description.of(checkpoint.meta)
    except InputError as error:
        raise InputError(f"{checkpoint.path}: {error}") from None


def _figures(description: Description | None) -> dict[str, float]:
    """What the model card says of a training. NaN is left out: it is not equal to itself."""
    info = description.info if description else {}
    numbers = {key: info[key] for key in _FIGURES if isinstance(info.get(key), int | float)}
    return {key: value for key, value in numbers.items() if math.isfinite(value)}


def _is_of_the_zoo(description: Description) -> bool:
    """Whether the weights were read from the model's own checkpoint in the zoo."""
    expected = find_entry(description.model).sha256
    return expected is not None and str(description.info.get("sha256")).startswith(expected)


def _license(description: Description) -> str | None:
    """The licence of weights of the zoo, as the Hub spells it, if their project states it."""
    source = SOURCES.get(find_entry(description.model).source or "")
    if source is None or source.weights_license is None or not _is_of_the_zoo(description):
        return None
    return source.weights_license.lower()


_TEXT = """\
# {model}

A network for semantic segmentation: EMANet
([Expectation-Maximization Attention Networks]({paper}), ICCV 2019).

| | |
| --- | --- |
| network | `{model}` |
| {count} classes of {dataset} | {classes} |
| inference | {inference} |
{more}
## Use

Install `emanet_triton` with its extra `hub`. Then:

```python
from emanet_triton import segment
from emanet_triton.hub import HubEMANet

model = HubEMANet.from_pretrained("{repo_id}")
labels = segment(model, "picture.jpg", fuse=True)  # uint8 [H, W]: indices of the classes
```
"""


def _card(description: Description, repo_id: str) -> str:
    """The text of the model card."""
    entry, info = find_entry(description.model), description.info
    dataset = description.described() or entry.dataset
    more = []
    if "file" in info:
        more.append(f"| weights from | `{info['file']}`, SHA-256 `{info['sha256']}` |\n")
    published = entry.published
    if published and _is_of_the_zoo(description):
        views = f"{len(entry.protocol.ratios)} scales and mirroring"
        averaged = f", {published.miou_ms_flip} with {views}" if published.miou_ms_flip else ""
        more.append(
            f"| mIoU of this file, as {SOURCES[str(entry.source)].project} published it | "
            f"{published.miou} on {dataset.name} val{averaged} |\n"
        )
    elif isinstance(info.get("mIoU"), float):
        more.append(
            f"| mIoU of this file in its training's validation | {info['mIoU']:.2f}, after "
            f"iteration {info.get('iteration')} |\n"
        )
    return _TEXT.format(
        model=description.model,
        paper=_PAPER,
        dataset=dataset.name,
        count=len(description.classes),
        classes=", ".join(description.classes),
        inference=_inference(description),
        more="".join(more),
        repo_id=repo_id,
    )


def _inference(description: Description) -> str:
    protocol = description.protocol
    size = "images keep their size"
    if protocol.base_scale:
        size = "images are resized to fit into {}x{} pixels".format(*protocol.base_scale)
    if protocol.crop is None:
        return f"{size}; the network sees the whole image"
    windows = "{1}x{0} pixels".format(*protocol.crop)
    return f"{size}; the network sees overlapping windows of {windows}"
