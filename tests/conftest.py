"""Property tests try the same examples every time; HYPOTHESIS_PROFILE=search looks for new ones."""

import os

from hypothesis import HealthCheck, settings

# A slow machine is no failure: neither the deadline nor this check has anything to say of the code.
settings.register_profile("search", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("same", settings.get_profile("search"), derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

# UCX looks at all of a machine's interfaces and breaks off when one of them goes, as those do that
# other tests make for network namespaces.
os.environ["UCX_NET_DEVICES"] = "lo"

# A test that lacks a fake fails at once; Ray would start a whole cluster for it and leave it there.
os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"
