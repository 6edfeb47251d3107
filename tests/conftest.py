"""Property tests try the same examples every time; HYPOTHESIS_PROFILE=search looks for new ones."""

import os

from hypothesis import HealthCheck, settings

# A slow machine is no failure: neither the deadline nor this check has anything to say of the code.
settings.register_profile("search", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("same", settings.get_profile("search"), derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))
