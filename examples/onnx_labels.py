"""Labels of a picture by a file of ``emanet-triton export --to onnx``, without PyTorch.

pip install onnxruntime numpy pillow
emanet-triton export CKPT --to onnx --part image-to-labels --out model.onnx
python examples/onnx_labels.py model.onnx street.jpg labels.png
"""

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def compute_labels(model: str, picture: str) -> tuple[np.ndarray, list[str]]:
    """Labels of a picture, uint8 [H, W], and the names of the classes.

    Raises:
        Exception: a file cannot be read, or the model takes no such picture.
    """
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    description = json.loads(metadata.get("emanet_triton_export", "{}"))
    if description.get("part") != "image-to-labels":
        raise ValueError(f"{model}: expected a file of --part image-to-labels")
    with Image.open(picture) as opened:
        if opened.mode[0] in "IF":  # Pillow would turn all values above 255 into white
            raise ValueError(f"{picture}: expected 8 bits for each value, got mode {opened.mode}")
        pixels = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))  # [H, W, 3]
    (images,) = session.get_inputs()
    if len(images.shape) == 4:
        pixels = pixels[None]
    for wanted, got in zip(images.shape, pixels.shape, strict=True):
        if isinstance(wanted, int) and wanted != got:  # a name in a file for all sizes
            raise ValueError(f"{picture}: expected pixels {images.shape}, got {pixels.shape}")
    (labels,) = session.run(None, {images.name: pixels})
    return labels.reshape(pixels.shape[-3:-1]), description.get("classes") or []


def main() -> None:
    parser = argparse.ArgumentParser(description="Labels of a picture by an ONNX file.")
    parser.add_argument("model", help="an ONNX file of --part image-to-labels")
    parser.add_argument("picture", help="a picture of the size for which the file is")
    parser.add_argument("labels", help="a PNG file to write, with the class of every pixel")
    args = parser.parse_args()
    for file in (args.model, args.picture):
        if not Path(file).is_file():
            parser.error(f"{file}: no such file")
        if Path(args.labels).exists() and Path(args.labels).samefile(file):
            parser.error(f"{file}: is to be read; expected another file for the labels")
    try:
        labels, classes = compute_labels(args.model, args.picture)
        Image.fromarray(labels).save(args.labels, "PNG")  # a JPEG file would change labels
    except Exception as error:  # ONNX Runtime's errors have no common type
        parser.error(str(error))
    for number, name in enumerate(classes):
        print(f"{name}: {np.mean(labels == number):.1%}")


if __name__ == "__main__":
    main()
