"""The option of the test in a browser."""


def pytest_addoption(parser):
    parser.addoption(
        "--screenshot", metavar="PNG", help="write a picture of the page with the first scene"
    )
