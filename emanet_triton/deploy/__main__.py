"""``emanet-triton export``: write a network as a file that other programs run."""

from argparse import Namespace
from collections.abc import Sequence

import torch

from emanet_triton.command import answer, run, say
from emanet_triton.cores import default_threads
from emanet_triton.data.description import SUFFIX, is_description
from emanet_triton.data.overlay import class_names
from emanet_triton.deploy.export import export, size_without_option
from emanet_triton.deploy.options import make_parser
from emanet_triton.errors import InputError
from emanet_triton.inference.build import load_network, open_device
from emanet_triton.inference.options import scaled
from emanet_triton.models.chosen import choose, read_chosen
from emanet_triton.models.description import Description


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 2 if the input cannot be used."""
    return answer(lambda: _main(make_parser().parse_args(arguments)))


def _main(args: Namespace) -> int:
    if args.dynamic and args.batch:
        raise InputError("--batch is for a file of one size; expected no --batch with --dynamic")
    device = open_device(args.device, [args.precision])
    torch.set_num_threads(args.threads or default_threads())
    if args.data and not is_description(args.data):
        raise InputError(f"--data {args.data}: expected a file *{SUFFIX} that describes a data set")
    chosen = choose(args.ckpt, args.model, args.data)
    protocol = scaled(chosen.protocol, args.scale)
    # Before a checkpoint is downloaded and read.
    size = args.size or size_without_option(protocol, args.to, args.part, args.dynamic)
    checkpoint = read_chosen(args.ckpt, chosen.name)
    model = load_network(chosen.name, checkpoint, device, num_classes=chosen.num_classes)
    model.protocol = chosen.protocol
    description = Description.of(checkpoint.meta)
    checkpoint.release()
    about = Description(
        chosen.name,
        class_names(chosen.dataset),
        chosen.protocol,
        chosen.dataset.description,
        {**(description.info if description else {}), "source_sha256": checkpoint.sha256},
    )
    exported = export(
        model,
        args.out,
        to=args.to,
        part=args.part,
        precision=args.precision,
        size=size,
        batch=args.batch,
        dynamic=args.dynamic,
        operators=args.operators,
        protocol=protocol,
        about=about,
        check=args.check,
        overwrite=args.force,
        progress=say,
    )
    for note in exported.notes:
        say(f"note: {note}")
    for file in exported.files:
        say(f"{file}: {file.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    run(main)
