import asyncio

import pytest

from tests.ray.serving import SMALL, serve
from tests.ray.streams import read_all

CONFIG = f"""
pools: {{units: 1, prefill: {{instances: 1}}, decode: {{instances: 2}}}}
limits: {{answer_s: 10, restarts: 1000}}
gateway: {{journal: {{reroute_s: 600}}}}
{SMALL}
"""
"""Patient with a slow machine: only what hangs does not answer for so long."""


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/ray" in str(item.path):
            item.add_marker(pytest.mark.ray)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A failure is shown with what its cluster has said."""
    report = yield
    serving = item.funcargs.get("cluster")
    if report.failed and serving is not None:
        report.sections.append(("what was served", serving.log.read_text()[-8000:]))
    return report


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """One prefill and two decode instances of the built-in model, shared by the tests. They stand
    on one placement group; what is started beyond them has its own."""
    folder = tmp_path_factory.mktemp("cluster")
    (folder / "config.yaml").write_text(CONFIG)
    serving = serve(folder / "serve.log", str(folder / "config.yaml"))
    yield serving
    status = serving.end()
    assert status == 0, serving.log.read_text()[-4000:]


@pytest.fixture(scope="session")
def undisturbed(cluster):
    """Every prompt's tokens when nothing happens to the cluster."""
    return asyncio.run(read_all(cluster))
