"""Settings of the evaluation's tests."""

from hypothesis import settings

# A busy machine is no bug.
settings.register_profile("of any speed", deadline=None)
settings.load_profile("of any speed")
