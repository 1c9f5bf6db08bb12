"""How many threads a command gives the network on a CPU if the user names none."""

import importlib

import pytest
import tiny_eval
import torch

from emanet_triton.errors import InputError

COMMANDS = {
    "eval": "--ckpt {ckpt} --data {city} --limit 1",
    "predict": "{city} --ckpt {ckpt} --out {out}",
    "train": "--data {city} --train-split val --val-split none --init {ckpt} --model tiny "
    "--crop 32x64 --scale 64x32 --workers 0 --out {out}",
    "deploy": "emanet_demo --to torch --size 64x64 --out {out}.pt2",
    "web": "--port 0",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_takes_the_number_of_the_variable(name, tmp_path, monkeypatch, capsys):
    asked = []

    def note(threads: int) -> None:
        asked.append(threads)
        raise InputError("the threads are known")

    monkeypatch.setattr(torch, "set_num_threads", note)
    monkeypatch.setattr("emanet_triton.web.__main__._require_gradio", lambda: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    city, ckpt = tiny_eval.write_cityscapes(tmp_path / "city"), tiny_eval.write_checkpoint(tmp_path)
    arguments = COMMANDS[name].format(city=city, ckpt=ckpt, out=tmp_path / "out").split()
    main = importlib.import_module(f"emanet_triton.{name}.__main__").main
    assert main(arguments) == 2
    assert capsys.readouterr().err.endswith("error: the threads are known\n")
    assert asked == [3]
