import os


def n_cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# Each of pytest-xdist's workers has its share of the cores, and its children as well: torch reads this when it is imported, and
# would otherwise start as many threads as there are cores in each of as many processes.
workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
if workers > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, n_cores() // workers)))

import pytest
import torch  # torch alone does not import triton
from hypothesis import Phase, settings

# Triton reads this when it is first imported, and transformers' models import it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Laws run on drawn shapes: no deadline for an example, and no explain phase, which takes 30 times as long as the failure.
settings.register_profile("laws", deadline=None, phases=set(Phase) - {Phase.explain}, max_examples=60)
settings.register_profile("laws-ci", settings.get_profile("laws"), derandomize=True, database=None, print_blob=True)
settings.load_profile("laws-ci" if os.environ.get("CI") else "laws")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """`pytest` alone runs a worker a core, if pytest-xdist is installed; single laws, debuggers and -n run as asked for."""
    options = config.option
    if "PYTEST_XDIST_WORKER" in os.environ:  # a worker, which comes here too, has no workers of its own
        return
    if getattr(options, "numprocesses", 0) is not None or options.collectonly or options.usepdb or options.trace:
        return
    if not any("::" in argument for argument in config.args):
        options.numprocesses = min(n_cores(), 16)  # more would only share one GPU's memory
        options.dist = "loadgroup" if options.dist == "no" else options.dist


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those laws first that compile many kernels, so that no worker is left with one at the end; and those that share a student
    trained once on one worker."""
    def compiles_much(item: pytest.Item) -> tuple[bool, bool]:
        drawn = hasattr(getattr(item, "obj", None), "hypothesis")
        return item.path.name == "test_kernels.py", drawn or item.name.startswith("test_every_launch")

    items.sort(key=compiles_much, reverse=True)
    for item in items:
        for fixture in {"student", "one_process"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.xdist_group(fixture))
