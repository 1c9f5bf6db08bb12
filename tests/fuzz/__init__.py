"""Fuzzers: damaged files of many kinds, read by the package under limits of memory and time.

Each module here that has a function ``attempt`` is a kind; ``python -m tests.fuzz`` runs it::

    def attempt(seed: int, folder: Path) -> str

It makes file number ``seed`` in ``folder``, which exists and is empty, and reads it with the
package. It returns "right" if the package read what the file holds, and "refused" if the package
raised ``InputError``. An ``AssertionError`` means that the package read something wrong. Any other
exception means that it crashed. The same seed makes the same file on every machine.
"""
