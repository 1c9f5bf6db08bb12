"""The option of the times in ``mmseg_time.py``."""


def pytest_addoption(parser):
    parser.addoption(
        "--times", metavar="FOLDER", help="measure times and write them to a file of this folder"
    )
