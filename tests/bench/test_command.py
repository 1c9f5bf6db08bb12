"""``python -m emanet_triton.bench``: its arguments, its files and its exit codes."""

import importlib
import re
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from emanet_triton import bench
from emanet_triton.bench import __main__ as command
from emanet_triton.bench import run
from emanet_triton.bench.case import Case
from emanet_triton.bench.options import Selection, run_parser
from emanet_triton.bench.rows import Row, read_rows
from emanet_triton.bench.suite import Suite
from emanet_triton.bench.suites import SUITES


def fake_cases(selection):
    """Two cases; in the second a provider is wrong."""
    for name, wrong in (("first", 1.0), ("second", 2.0)):
        providers = {"plain": lambda: lambda: 1.0, "ours": lambda wrong=wrong: lambda: wrong}
        yield Case(
            suite="em",
            name=name,
            providers=selection.pick(providers, "plain"),
            baseline="plain",
            error=lambda got: abs(got - 1),
            bound=0.01,
        )


@pytest.fixture
def fake_suite(monkeypatch):
    suite = Suite("em", "Fake", "nothing", fake_cases)
    monkeypatch.setattr(command, "SUITES", {"em": suite})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "error: unknown suite 'nothing'; expected one of: em"),
        (["em", "--sizes", "512"], "error: argument --sizes: expected two sizes such as 512x1024"),
        (["model", "--sizes", "9x100000"], "error: argument --sizes: expected sides of 1 to 16384"),
        (["em", "--threads", "50000"], "argument --threads: expected at most 1024 threads"),
        (["em", "--rounds", "0"], "argument --rounds: expected a whole number of at least 1"),
        (["em", "--silence", "0"], "argument --silence: expected a number above 0, got '0'"),
        (["em", "--seconds", "nan"], "argument --seconds: expected a number above 0, got 'nan'"),
        (["em", "--dtypes", "fp8"], "argument --dtypes: invalid choice: 'fp8'"),
        (
            ["em", "--tiny", "--device", "cpu", "--providers", "mmsegg"],
            "error: --providers: mmsegg: not in suite em on cpu; expected some of: mmseg, "
            "mmseg-compiled, ours-torch",
        ),
        (
            ["em", "--tiny", "--csv", "/proc/none/x"],
            "error: --csv /proc/none: expected a folder that can be written (No such file",
        ),
        (
            ["em", "--tiny", "--csv", "/proc/version/a/x.csv"],
            "error: --csv /proc/version/a: expected a folder that can be written (Not a directory",
        ),
        (
            ["em", "--tiny", "--plot", "/proc/none"],
            "error: --plot /proc/none: expected a folder that can be written (No such file",
        ),
        (["em", "--what"], "error: unrecognized arguments: --what"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_bad_arguments_end_with_one_line(capsys, arguments, message):
    assert command.main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]


def test_rows_cannot_go_where_charts_go(capsys, tmp_path, fake_suite):
    path = tmp_path / "new"
    assert command.main(["em", "--device", "cpu", "--csv", str(path), "--plot", str(path)]) == 2
    output = capsys.readouterr()
    assert output.err == f"error: --csv {path}: expected a file to write, this is a folder\n"
    assert output.out == ""  # nothing was measured


def test_no_more_threads_than_cores_unless_asked_for(fake_suite, tmp_path, monkeypatch):
    path, before = tmp_path / "rows.csv", torch.get_num_threads()
    monkeypatch.setattr(command, "usable_cores", lambda: 2)
    torch.set_num_threads(3)
    try:
        for given, wanted in (([], 2), (["--threads", "3"], 3)):
            command.main(["em", "--tiny", "--csv", str(path), *given])
            assert {row.threads for row in read_rows(path)} == {wanted}
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_rows_go_to_a_file_and_a_wrong_provider_is_exit_1(fake_suite, tmp_path, capsys):
    path = tmp_path / "rows.csv"
    assert command.main(["em", "--tiny", "--csv", str(path)]) == 1
    gates = [(row.case, row.provider, row.gate.split(":")[0]) for row in read_rows(path)]
    assert gates == [
        ("first", "plain", "passed"),
        ("first", "ours", "passed"),
        ("second", "plain", "passed"),
        ("second", "ours", "failed"),
    ]
    printed = capsys.readouterr().out
    assert "failed: error 1.0e+00 above 1.0e-02" in printed
    assert "noise" in printed


def test_rows_replace_only_rows(fake_suite, tmp_path, capsys):
    path = tmp_path / "keep.pth"
    path.write_text("suite,case,ours\n")
    assert command.main(["em", "--tiny", "--csv", str(path)]) == 2
    assert capsys.readouterr().err == (
        f"error: --csv {path}: exists and is no table of emanet-triton bench; expected a new name, "
        "or such a file, which is replaced\n"
    )
    assert path.read_text() == "suite,case,ours\n"
    path.write_text("")
    for _ in range(2):
        assert command.main(["em", "--tiny", "--csv", str(path)]) == 1
        assert len(read_rows(path)) == 4


def test_rows_go_to_a_stream_once(fake_suite, tmp_path):
    with (tmp_path / "rows.csv").open("wb") as file:
        assert command.main(["em", "--tiny", "--csv", f"/dev/fd/{file.fileno()}"]) == 1
    assert len(read_rows(tmp_path / "rows.csv")) == 4


def test_charts_that_cannot_be_drawn_end_a_run_before_it_begins(
    fake_suite, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(command.charts, "has_matplotlib", lambda: False)
    monkeypatch.setattr(command, "_measure_all", None)
    assert command.main(["em", "--tiny", "--plot", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        "error: charts need matplotlib, which is not installed: pip install matplotlib\n"
    )


def test_cases_by_a_part_of_their_names(fake_suite, tmp_path, capsys):
    path = tmp_path / "rows.csv"
    given = ["em", "--tiny", "--threads", "1", "--csv", str(path), "--cases"]
    assert command.main([*given, "irs", "none"]) == 0
    assert {row.case for row in read_rows(path)} == {"first"}
    assert command.main([*given, "none", "--providers", "plain"]) == 2
    assert capsys.readouterr().err.endswith(
        "error: nothing to run: no case of suite em fits --sizes, --batches, --dtypes, "
        "--networks and --cases\n"
    )


def test_ctrl_c_keeps_what_is_finished(fake_suite, monkeypatch, tmp_path, capsys):
    real = run.measure

    def interrupted(case, *arguments):
        if case.name == "second":
            raise KeyboardInterrupt
        return real(case, *arguments)

    monkeypatch.setattr(run, "measure", interrupted)
    path = tmp_path / "rows.csv"
    assert command.main(["em", "--tiny", "--threads", "1", "--csv", str(path)]) == 2
    assert [row.case for row in read_rows(path)] == ["first", "first"]
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "interrupted; nothing was saved (--csv FILE)\n"),
        (["--csv", "rows.csv"], "interrupted; what is finished is in the files asked for\n"),
    ],
)
def test_ctrl_c_says_what_is_saved(fake_suite, monkeypatch, tmp_path, capsys, arguments, message):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "_measure_all", interrupted)
    assert command.main(["em", "--tiny", *arguments]) == 2
    assert capsys.readouterr().err == message


def test_ctrl_c_ends_the_worker(fake_suite, monkeypatch, tmp_path):
    class Place(run.Here):
        closed = False

        def measure(self, cases, case, machine, found):
            if case.name == "second":
                raise KeyboardInterrupt
            super().measure(cases, case, machine, found)

        def close(self):
            Place.closed = True

    monkeypatch.setattr(command, "_place", lambda selection, method, _: Place(selection, method))
    path = tmp_path / "rows.csv"
    assert command.main(["em", "--tiny", "--csv", str(path)]) == 2
    assert Place.closed
    assert [row.case for row in read_rows(path)] == ["first", "first"]


def test_a_run_prints_forecasts_beside_outcomes_and_leaves_empty_columns_out(fake_suite):
    row = Row("em", "block", "triton", "passed", p50_ms=0.2, predicted_ms="0.14-0.175")
    lines = command._table([row, replace(row, provider="torch", predicted_ms="", p50_ms=None)])
    header, _, triton, torch = lines.splitlines()[2:6]
    assert header.split() == ["case", "provider", "ms", "predicted", "gate"]
    assert triton.split() == ["block", "triton", "0.2", "0.14-0.175", "passed"]
    assert torch.split() == ["torch", "passed"]


def test_ctrl_c_before_the_first_row_leaves_a_file_as_it_was(fake_suite, monkeypatch, tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "measure", interrupted)
    path = tmp_path / "rows.csv"
    path.write_text("earlier rows")
    assert command.main(["em", "--tiny", "--csv", str(path)]) == 2
    assert path.read_text() == "earlier rows"


@pytest.mark.parametrize("name", ["report", "compare"])
def test_other_commands_get_the_rest_of_the_arguments(monkeypatch, name):
    seen = []
    module = ModuleType(name)
    module.main = lambda arguments: seen.append(arguments) or 1
    monkeypatch.setitem(sys.modules, f"emanet_triton.bench.{name}", module)
    monkeypatch.setattr(bench, name, module, raising=False)
    assert command.main([name, "a", "b"]) == 1
    assert seen == [["a", "b"]]


def test_a_run_of_passed_providers_is_exit_0(fake_suite):
    assert command.main(["em", "--tiny", "--providers", "plain"]) == 0


def test_no_arguments_are_a_short_run_of_all_suites(monkeypatch):
    seen = []
    monkeypatch.setattr(command, "_run", lambda options: seen.append(options) or 0)
    command.main([])
    selection = command._selection(seen[0])
    assert selection.quick
    assert not selection.tiny
    assert not command._selection(command.parse(["em"], ["em"])).quick


def test_picking_providers():
    providers = dict.fromkeys(("fast", "plain", "slow"), 0)
    assert list(Selection().pick(providers, "plain", ["slow"])) == ["plain", "fast"]
    asked = Selection(providers=("slow", "elsewhere"))
    assert list(asked.pick(providers, "plain", ["slow"])) == ["plain", "slow"]
    every = Selection(every=True)
    assert list(every.pick(providers, "plain", ["slow"])) == ["plain", "fast", "slow"]


def test_help_says_how_long_a_run_takes(capsys):
    with pytest.raises(SystemExit):
        command.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "smallest cases; all suites take some minutes, about six on two cores" in said
    assert "a short selection of all suites, which takes minutes for each suite" in said


def test_help_explains_every_option_without_markup():
    modules = [importlib.import_module(each.module) for each in command.COMMANDS.values()]
    for parser in (run_parser(["em"]), *(module.make_parser() for module in modules)):
        assert "``" not in parser.format_help()
        assert [action.dest for action in parser._actions if not action.help] == []


@pytest.mark.parametrize(("option", "value"), [("batches", 3), ("dtypes", "fp16")])
def test_help_names_the_suites_that_take_an_option(option, value):
    tiny = Selection(tiny=True)
    taking = {"and", "conv"}  # conv takes both, but it needs seconds for its cases
    for name in SUITES.keys() - taking:
        before, after = (
            [case.name for case in SUITES[name].cases(selection)]
            for selection in (tiny, replace(tiny, **{option: (value,)}))
        )
        taking |= {name} if after and after != before else set()
    (said,) = (action.help for action in run_parser([])._actions if action.dest == option)
    assert set(re.findall(r"[a-z-]+", re.search("which the suites (.*?) take", said)[1])) == taking
