"""What is packaged, and how the tests themselves run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

here = Path(__file__).resolve().parent


def test_every_module_is_packaged_and_every_test_comes_with_the_source():
    """Each file of the folder in the wheel, or, as MANIFEST.in says, in the sdist; and so is what the README shows."""
    project = (here / "pyproject.toml").read_text(encoding="utf-8")
    modules = set(re.findall(r'"(\w+)"', re.search(r"py-modules = \[(.*?)\]", project, re.DOTALL)[1]))
    tests = {path.stem for path in here.glob("test_*.py")} | {"conftest"}
    assert modules | tests == {path.stem for path in here.glob("*.py")} and not modules & tests
    manifest = (here / "MANIFEST.in").read_text(encoding="utf-8").split()
    assert {"conftest.py", "test_*.py"} <= set(manifest)
    for link in re.findall(r"\]\(([\w./]+)[)#]", (here / "README.md").read_text(encoding="utf-8")):
        assert (here / link).exists() and (Path(link).stem in modules | tests or link.split("/")[0] in manifest), link


@pytest.mark.parametrize("options, processes", [([], "several"), (["-p", "no:xdist"], "one"), (["test_it.py::test_threads"], "one")])
def test_pytest_alone_runs_workers_that_share_the_cores(tmp_path, options, processes):
    """In one process without pytest-xdist, or if asked for a single law."""
    pytest.importorskip("xdist")
    (tmp_path / "conftest.py").write_text((here / "conftest.py").read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "test_it.py").write_text(
        "import os, pathlib, conftest, torch\n"
        "def test_threads():\n"
        "    workers = int(os.environ.get('PYTEST_XDIST_WORKER_COUNT', 0))\n"
        "    assert not workers or torch.get_num_threads() <= max(1, conftest.n_cores() // workers)\n"
        "    pathlib.Path('processes').write_text('several' if workers else 'one')\n")
    env = {name: x for name, x in os.environ.items() if not name.startswith("PYTEST_") and name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-m", "pytest", "-q", *options]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and (tmp_path / "processes").read_text() == processes, done.stdout[-2000:] + done.stderr[-2000:]
