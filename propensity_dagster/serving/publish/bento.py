"""Building the bento: the worker's code and the released packages, nothing that holds customers."""

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import propensity_dagster
from propensity_dagster.data.lake import Home
from propensity_dagster.errors import ConfigError, StorageError
from propensity_dagster.serving.packages import PACKAGES, RELEASE, read_release_file

_CODE = Path(propensity_dagster.__file__).parent


@dataclass(frozen=True)
class BentoReport:
    """What was built, and which package of each campaign is in it."""

    tag: str
    megabytes: float
    packages: dict[str, str]


def build_bento(home: Home) -> BentoReport:
    """Build `propensity:latest` in BENTOML_HOME from what is released now. Needs no network.

    Raises:
        ConfigError: when nothing has been released.
        StorageError: when BentoML does not build it.
    """
    releases = sorted(home.serving.glob(f"*/{RELEASE}"))
    if not releases:
        raise ConfigError(f"{home.serving}: nothing has been released yet: train and promote a champion first")
    with tempfile.TemporaryDirectory(prefix="propensity-bento-") as scratch:
        root = Path(scratch)
        shutil.copy(_CODE / "serving" / "bentofile.yaml", root)
        _copy_code(root / _CODE.name)
        packages = {file.parent.name: _copy_release(file.parent, root / ".propensity" / "serving") for file in releases}
        command = [sys.executable, "-m", "bentoml", "build", "--output", "tag", str(root)]
        environment = {**os.environ, "BENTOML_DO_NOT_TRACK": "true"}
        built = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    if built.returncode:
        raise StorageError(f"bentoml build failed: {built.stderr.strip()[-2000:]}")
    tag = built.stdout.strip().splitlines()[-1].removeprefix("__tag__:")
    return BentoReport(tag, _megabytes(tag), packages)


def _copy_code(target: Path) -> None:
    (target / "serving").mkdir(parents=True)
    files = [
        *(_CODE / name for name in ("__init__.py", "errors.py", "manifest.py", "wording.py")),
        *(_CODE / "serving").glob("*.py"),
    ]
    for file in files:
        shutil.copy(file, target / file.relative_to(_CODE))


def _copy_release(folder: Path, target: Path) -> str:
    release = read_release_file(folder)
    for name in (release.champion, release.challenger):
        if name is not None:
            shutil.copytree(folder / PACKAGES / name, target / folder.name / PACKAGES / name)
    shutil.copy(folder / RELEASE, target / folder.name / RELEASE)
    return release.champion


def _megabytes(tag: str) -> float:
    # Not `bentoml get`: it breaks a long path into lines.
    program = "import bentoml, sys; print(bentoml.get(sys.argv[1]).path)"
    shown = subprocess.run([sys.executable, "-c", program, tag], capture_output=True, text=True, check=False)
    if shown.returncode:
        raise StorageError(f"bentoml built {tag} but does not find it: {shown.stderr.strip()[-2000:]}")
    return sum(file.stat().st_size for file in Path(shown.stdout.strip()).rglob("*") if file.is_file()) / 1e6
