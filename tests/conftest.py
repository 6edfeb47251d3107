"""Property tests try the same examples every time; HYPOTHESIS_PROFILE=search looks for new ones.

Run in several processes, a module stays in one; all that start a real Ray share one.
"""

import os

import pytest
from hypothesis import HealthCheck, settings

# A slow machine is no failure: neither the deadline nor this check has anything to say of the code.
settings.register_profile("search", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("same", settings.get_profile("search"), derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


@pytest.hookimpl(tryfirst=True)  # before the groups are read
def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent.name == "ray":
            item.add_marker(pytest.mark.ray)
    items.sort(key=lambda item: item.get_closest_marker("ray") is None)
    for item in items:
        folder = item.path.parent.name
        together = folder if folder == "ray" else f"{folder}/{item.path.stem}"
        item.add_marker(pytest.mark.xdist_group(together))
