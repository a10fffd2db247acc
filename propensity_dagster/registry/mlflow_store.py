"""The model store on MLflow: SQLite for the records, folders for the models. Only this package imports mlflow."""

import io
import json
import logging
import os
import subprocess
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from propensity_dagster.data.lake import Home, locked
from propensity_dagster.errors import ConfigError
from propensity_dagster.models.saved import model_identity
from propensity_dagster.registry.store import MADE_LATER, Event, Version

CHAMPION, CHALLENGER = "champion", "challenger"
_ARTIFACT = "saved_model"
_REPORTS = "reports"
_EVENT_TAG = "event_"
_REQUIREMENTS = ("lightgbm", "numpy", "pyarrow", "scipy")


class MlflowStore:
    """See `ModelStore`. Nothing is opened before the first use: importing mlflow takes a second."""

    def __init__(self, home: Home) -> None:
        self._home = home

    @cached_property
    def _client(self) -> Any:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("DO_NOT_TRACK", "true")
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        import mlflow

        for noisy in ("mlflow", "alembic"):
            logging.getLogger(noisy).setLevel(logging.ERROR)

        uri = f"sqlite:///{self._home.root / 'mlflow.db'}"
        self._home.ensure()
        # Two processes that first open one fresh database corrupt it for good: the first use is alone.
        with locked(self._home.root / ".mlflow.lock"):
            mlflow.set_tracking_uri(uri)
            mlflow.set_registry_uri(uri)
            client = mlflow.MlflowClient(uri, uri)
            client.search_experiments(max_results=1)
        return client

    def record_training(
        self, campaign: str, folder: Path, record: Mapping[str, Any], reports: Path, facts: Mapping[str, Any]
    ) -> Version:
        """Log parameters, metrics and reports of every candidate; register the challenger as a version."""
        identity = model_identity(folder)
        known = next((v for v in self.versions(campaign) if v.identity == identity), None)
        if known is not None:
            return known
        client = self._client
        import mlflow

        challenger = record["challenger"]
        with mlflow.start_run(experiment_id=self._experiment(campaign), run_name=f"{campaign} {challenger}") as run:
            mlflow.set_tags({"campaign": campaign, "git_revision": git_revision(), "challenger": challenger})
            mlflow.log_params({k: v for k, v in facts.items() if isinstance(v, str | int | float)})
            mlflow.log_metrics(_flat_metrics(record))
            for file in sorted(reports.glob("*")):
                if file.is_file() and not file.name.startswith(MADE_LATER):
                    mlflow.log_artifact(str(file), _REPORTS)
            # It prints greetings to stderr and warns of a missing example; errors still come as exceptions.
            with redirect_stderr(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                info = mlflow.pyfunc.log_model(
                    name=challenger,
                    python_model=str(Path(__file__).parent / "pyfunc_model.py"),
                    artifacts={_ARTIFACT: str(folder)},
                    pip_requirements=list(_REQUIREMENTS),
                    signature=_signature(),
                    registered_model_name=campaign,
                )
        version = str(info.registered_model_version)
        client.set_model_version_tag(campaign, version, "identity", identity)
        client.set_model_version_tag(campaign, version, "model", challenger)
        client.set_registered_model_alias(campaign, CHALLENGER, version)
        return Version(version, challenger, identity, run.info.run_id, (CHALLENGER,))

    def versions(self, campaign: str) -> list[Version]:
        """Every registered version, oldest first."""
        found = self._client.search_model_versions(f"name='{campaign}'")
        aliases = self._aliases(campaign)
        return [
            Version(
                str(v.version),
                v.tags.get("model", ""),
                v.tags.get("identity", ""),
                v.run_id,
                tuple(sorted(a for a, version in aliases.items() if version == str(v.version))),
            )
            for v in sorted(found, key=lambda v: int(v.version))
        ]

    def version(self, campaign: str, version: str) -> Version:
        """One registered version.

        Raises:
            ConfigError: naming the versions there are.
        """
        known = {v.version: v for v in self.versions(campaign)}
        if version not in known:
            raise ConfigError(f"{campaign}: there is no version {version}; there are {', '.join(known) or 'none'}")
        return known[version]

    def champion(self, campaign: str) -> Version | None:
        """The version with the alias champion, if there is one."""
        return next((v for v in self.versions(campaign) if CHAMPION in v.aliases), None)

    def folder(self, campaign: str, version: str) -> Path:
        """Where the saved model of a version lies."""
        self.version(campaign, version)
        from mlflow.artifacts import download_artifacts

        path = Path(download_artifacts(f"models:/{campaign}/{version}"))
        (folder,) = [p for p in (path / "artifacts").iterdir() if (p / "manifest.json").exists()]
        return folder

    def log_reports(self, campaign: str, version: str, files: Sequence[Path]) -> None:
        """Keep files with the run that a version came from; MLflow's UI shows them under its artifacts."""
        run_id = self.version(campaign, version).run_id
        for file in files:
            self._client.log_artifact(run_id, str(file), _REPORTS)

    def evaluation(self, campaign: str, version: str) -> dict[str, Any]:
        """The record that was logged when the version was registered."""
        run_id = self.version(campaign, version).run_id
        from mlflow.artifacts import download_artifacts

        with tempfile.TemporaryDirectory() as place:
            name = f"{_REPORTS}/evaluation.json"
            file = Path(download_artifacts(run_id=run_id, artifact_path=name, dst_path=place))
            return json.loads(file.read_text(encoding="utf-8"))

    def promote(self, campaign: str, version: str, why: str) -> None:
        """Move the alias and record the event."""
        self._make_champion(campaign, version, "promoted", why)

    def refuse(self, campaign: str, version: str, why: str) -> None:
        """Record the refusal."""
        champion = self.champion(campaign)
        self._append(campaign, "refused", version, champion.version if champion else None, why)

    def roll_back(self, campaign: str, to: str | None, why: str) -> Event:
        """Move the alias to the champion before the present one, or to version `to`.

        Raises:
            ConfigError: when there is no champion, none before it, or no version `to`.
        """
        champion = self.champion(campaign)
        if champion is None:
            raise ConfigError(f"{campaign}: there is no champion to roll back")
        target = to or self._before(campaign, champion.version)
        if target is None:
            raise ConfigError(f"{campaign}: version {champion.version} is the first champion; there is none before it")
        self.version(campaign, target)
        if target == champion.version:
            raise ConfigError(f"{campaign}: version {target} is the champion already")
        return self._make_champion(campaign, target, "rolled back", why)

    def history(self, campaign: str) -> list[Event]:
        """Every promotion, refusal and rollback, oldest first."""
        model = self._registered_model(campaign)
        tags = model.tags if model else {}
        return [Event(**json.loads(value)) for name, value in sorted(tags.items()) if name.startswith(_EVENT_TAG)]

    def _before(self, campaign: str, version: str) -> str | None:
        """The champion that `version` replaced when it was last promoted: repeated rollbacks walk back."""
        promotions = [e for e in self.history(campaign) if e.version == version and e.action == "promoted"]
        return promotions[-1].previous if promotions else None

    def _make_champion(self, campaign: str, version: str, action: str, why: str) -> Event:
        champion = self.champion(campaign)
        # The event first: a crash in between leaves a record of what was meant, never a silent change.
        event = self._append(campaign, action, version, champion.version if champion else None, why)
        self._client.set_registered_model_alias(campaign, CHAMPION, version)
        return event

    def _append(self, campaign: str, action: str, version: str, previous: str | None, why: str) -> Event:
        number = len(self.history(campaign)) + 1
        at = datetime.now(UTC).isoformat(timespec="seconds")
        event = Event(number, action, version, previous, at, why)
        self._client.set_registered_model_tag(campaign, f"{_EVENT_TAG}{number:06d}", json.dumps(asdict(event)))
        return event

    def _registered_model(self, campaign: str) -> Any:
        found = self._client.search_registered_models(f"name='{campaign}'")
        return found[0] if found else None

    def _aliases(self, campaign: str) -> dict[str, str]:
        model = self._registered_model(campaign)
        return {alias: str(version) for alias, version in model.aliases.items()} if model else {}

    def _experiment(self, campaign: str) -> str:
        found = self._client.get_experiment_by_name(campaign)
        if found is not None:
            return found.experiment_id
        artifacts = self._home.root / "mlruns" / campaign
        return self._client.create_experiment(campaign, artifact_location=artifacts.as_uri())


def git_revision() -> str:
    """The revision of the code, or "unknown" outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _signature() -> Any:
    """Outputs only: MLflow would refuse whole numbers where it was told numbers; our contract checks inputs."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema

    return ModelSignature(outputs=Schema([ColSpec("double")]))


def _flat_metrics(record: Mapping[str, Any]) -> dict[str, float]:
    return {
        f"{model}.{metric}": estimate["value"]
        for model, metrics in record["models"].items()
        for metric, estimate in metrics.items()
        if estimate["value"] is not None
    }
