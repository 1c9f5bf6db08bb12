"""The command that times large pages, with processes that are ended from outside."""

from concurrent.futures.process import BrokenProcessPool

from emanet_triton.bench import large_pages


def test_a_process_that_is_ended_is_one_message_and_keeps_the_rows(tmp_path, monkeypatch, capsys):
    def measure(function, image, dtype, calls, value):
        if dtype == "bf16":
            raise BrokenProcessPool
        return 20.0, 1.0, 30.0

    monkeypatch.setattr(large_pages, "in_child", measure)
    path = tmp_path / "pages.csv"
    assert large_pages.main(["--sizes", "64x96", "--csv", str(path)]) == 2
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert line.startswith("error: --sizes 64x96, bf16: ")
    assert "expected a size that fits" in line
    assert printed.out.count("r50 network 64x96") == path.read_text().count("64x96,fp32") == 2


def test_nothing_is_written_without_a_row(tmp_path, monkeypatch, capsys):
    def measure(*_):
        raise BrokenProcessPool

    monkeypatch.setattr(large_pages, "in_child", measure)
    path = tmp_path / "pages.csv"
    assert large_pages.main(["--csv", str(path)]) == 2
    assert not path.exists()
    assert not capsys.readouterr().out
