"""The progress bar of every command line."""

from tqdm import tqdm


class Bar(tqdm):
    """A progress bar without the thread that tqdm starts to refresh slow bars."""

    monitor_interval = 0
