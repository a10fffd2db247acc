"""The command line. Thin: every command prepares the environment and calls one function or one process."""

import os
import signal
import subprocess
import sys
from datetime import date
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from propensity_dagster.campaign import CAMPAIGNS, SHIPPED, Campaign, find_campaign, load_campaigns
from propensity_dagster.data.lake import LAKE, Home, publish_text
from propensity_dagster.errors import ConfigError, PropensityError
from propensity_dagster.reports.site import DEFAULT_PORT, URL, serve_reports

app = typer.Typer(
    help="Customer propensity modelling as a Dagster lineage graph. One campaign is one YAML file.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
champion_app = typer.Typer(help="The model that serves: who it is, how it got there, and back.", no_args_is_help=True)
app.add_typer(champion_app, name="champion")
key_app = typer.Typer(help="API keys of the service. Without any, only this machine may call.", no_args_is_help=True)
app.add_typer(key_app, name="key")
experiment_app = typer.Typer(
    help="Experiments of a campaign: how long they take, what they showed.", no_args_is_help=True
)
app.add_typer(experiment_app, name="experiment")
alerts_app = typer.Typer(help="What somebody was told, or should be, and to whom.", no_args_is_help=True)
app.add_typer(alerts_app, name="alerts")

DEFAULT_CAMPAIGN = "ecommerce_purchase"
_DEFAULT = "PROPENSITY_DEFAULT_CAMPAIGN"

CampaignArgument = Annotated[
    str, typer.Argument(metavar="CAMPAIGN", help="A campaign's name, or the path of its YAML file.")
]

SnapshotOption = Annotated[str | None, typer.Option(metavar="DATE", help="Snapshot; the newest, if absent.")]
CapacityOption = Annotated[int | None, typer.Option(min=0, help="Contacts; the campaign file's, if absent.")]
BudgetOption = Annotated[float | None, typer.Option(min=0, help="Money; the campaign file's, if absent.")]


@app.command()
def demo(campaign: CampaignArgument = DEFAULT_CAMPAIGN) -> None:
    """Run one campaign end to end through Dagster, then print what came out.

    The default campaign makes its own synthetic data. Give a file, such as examples/cdnow.yaml, for yours.
    """
    chosen = find_campaign(campaign)
    _launch(chosen)
    from propensity_dagster.reports.summary import print_summary

    print_summary(chosen, Home.from_environment(), _console())


@app.command()
def score(
    campaign: CampaignArgument = DEFAULT_CAMPAIGN,
    snapshot: SnapshotOption = None,
    rows: Annotated[
        list[str] | None,
        typer.Option(help="For tables of decisions: file, folder or table of rows to score; may be repeated."),
    ] = None,
) -> None:
    """Score one snapshot with the champion, through Dagster; prints the file of scores."""
    options = ["--score", *(["--snapshot", _date(snapshot)] if snapshot else [])]
    for place in rows or []:
        options += ["--rows", str(Path(place).resolve()) if Path(place).exists() else place]
    _launch(find_campaign(campaign), *options)


@app.command()
def plan(
    campaign: CampaignArgument = DEFAULT_CAMPAIGN,
    snapshot: SnapshotOption = None,
    capacity: CapacityOption = None,
    budget: BudgetOption = None,
) -> None:
    """Show whom of a scored snapshot it pays to contact, and what that is expected to earn. Contacts nobody."""
    from propensity_dagster.data.days import now_utc
    from propensity_dagster.reports.summary import print_plan
    from propensity_dagster.runtime import Runtime
    from propensity_dagster.scoring.batch import newest_scored
    from propensity_dagster.scoring.contacts import plan_contacts

    chosen, home = find_campaign(campaign), Home.from_environment()
    newest = newest_scored(chosen, home)
    day = date.fromisoformat(_date(snapshot)) if snapshot else newest
    with Runtime.from_environment().local_engine() as engine:
        planned = plan_contacts(chosen, day, home, engine, now_utc(), capacity, budget)
    print_plan(chosen, planned, _console())


@app.command()
def audience(
    campaign: CampaignArgument = DEFAULT_CAMPAIGN,
    snapshot: SnapshotOption = None,
    capacity: CapacityOption = None,
    budget: BudgetOption = None,
) -> None:
    """Choose whom to contact, as consent stands now, and send it to the campaign's exports, through Dagster."""
    options = ["--audience", *(["--snapshot", _date(snapshot)] if snapshot else [])]
    options += [] if capacity is None else ["--capacity", str(capacity)]
    options += [] if budget is None else ["--budget", str(budget)]
    chosen = find_campaign(campaign)
    _launch(chosen, *options)
    from propensity_dagster.reports.summary import print_audience
    from propensity_dagster.scoring.batch import newest_scored

    home = Home.from_environment()
    day = date.fromisoformat(snapshot) if snapshot else newest_scored(chosen, home)
    print_audience(chosen, day, home, _console())


@app.command()
def erase(
    person: Annotated[str, typer.Argument(metavar="ID", help="Key of the person, as in the source.")],
    yes: Annotated[bool, typer.Option("--yes", help="Erase; without it, only show what would be.")] = False,
    campaign: Annotated[
        list[str] | None, typer.Option(help="One more campaign file, besides those of the folder; may be repeated.")
    ] = None,
) -> None:
    """Erase a person from every campaign: tables, scores, audiences, online store, logs. Shows first; --yes erases."""
    from propensity_dagster.erasure import erase_person, find_person

    home, store = Home.from_environment(), _store()
    campaigns = load_campaigns(Path(os.environ.get(CAMPAIGNS) or SHIPPED))
    campaigns += [find_campaign(file) for file in campaign or ()]
    found = erase_person(person, campaigns, home, store) if yes else find_person(person, campaigns, home, store)
    table = Table(title="erased" if yes else "would be erased", title_justify="left")
    for column in ("campaign", "where", "files", "rows"):
        table.add_column(column)
    groups = dict.fromkeys((place.campaign, place.table) for place in found.places)
    for name, where in groups:
        of_group = [p for p in found.places if (p.campaign, p.table) == (name, where)]
        table.add_row(name, where, f"{len(of_group):,}", f"{sum(p.rows for p in of_group):,}")
    _console().print(table)
    for name, versions in found.models.items():
        print(f"{name}: trained on the person: version {', '.join(versions)}; a new training is not")
    for words in found.outside:
        print(f"outside the home folder, to be erased there: {words}")
    if yes:
        print(
            f"{found.rows:,} rows erased; a search over {home.root} finds {found.left}. "
            "Ingestion leaves the person out."
        )
    else:
        print(f"{found.rows:,} rows in {len(found.places):,} files; nothing was changed. To erase: add --yes")


@app.command()
def move_lake(url: Annotated[str, typer.Argument(help="Where to: s3://BUCKET/PREFIX.")]) -> None:
    """Move the tables of all campaigns to an object store, while nothing runs; the home folder keeps a working copy."""
    from propensity_dagster.data.objects import move_lake as move

    os.environ.pop(LAKE, None)  # it names where the lake shall be, and it is not there yet
    home = Home.from_environment().ensure()
    print(f"{move(home.lakes, url):,} files are in {url}; {home.lakes} is a working copy of it from now on")


@app.command()
def doctor(
    campaign: CampaignArgument,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Look at a campaign's data before any compute: coded findings with their remedy. Exit status 1 on errors."""
    from propensity_dagster.doctor import Diagnosis, diagnose
    from propensity_dagster.reports.diagnosis import print_diagnosis
    from propensity_dagster.runtime import Runtime

    runtime = Runtime.from_environment()
    try:
        chosen = find_campaign(campaign)
    except ConfigError as error:
        if not as_json:
            raise
        diagnosis = Diagnosis(campaign)
        diagnosis.add("P001", "campaign file", str(error))
    else:
        with runtime.local_engine() as engine:
            diagnosis = diagnose(chosen, runtime.home, engine, ingested=False)
    if as_json:
        print(diagnosis.to_json())
    else:
        print_diagnosis(diagnosis, _console())
    if diagnosis.errors:
        raise typer.Exit(1)


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="Name of the new campaign.")],
    data: Annotated[str, typer.Option("--from", help="A file, a folder of parquet or CSV files, or a database.")],
    outcome: Annotated[
        str | None, typer.Option(help="Outcome column of a single table, or event log of several; guessed, if absent.")
    ] = None,
    to: Annotated[Path, typer.Option(help="Folder that the file goes to.")] = Path("campaigns"),
) -> None:
    """Write a commented campaign file from a look at the data, and show what the doctor says of it."""
    from propensity_dagster.doctor.draft import draft_campaign
    from propensity_dagster.reports.diagnosis import print_diagnosis
    from propensity_dagster.runtime import Runtime

    runtime = Runtime.from_environment()
    with runtime.local_engine() as engine:
        file, diagnosis = draft_campaign(name, data, outcome, to, runtime.home, engine)
    print_diagnosis(diagnosis, _console())
    print(f"wrote {file}; look at it, then: propensity demo {file}")


@app.command()
def dev(
    port: Annotated[int, typer.Option(help="Port of the UI on 127.0.0.1.")] = 3001,
    reports_port: Annotated[int, typer.Option(help="Port of the reports that the UI links to.")] = DEFAULT_PORT,
) -> None:
    """Start Dagster's UI and daemon on the home folder, and the reports beside them; stop with Ctrl-C."""
    load_campaigns(Path(os.environ.get(CAMPAIGNS) or SHIPPED))  # a broken file is told here, not in an empty UI
    environment = _environment(None)
    reports = serve_reports(Home.from_environment().root / "reports", reports_port)
    environment.setdefault(URL, reports)
    # `python -m` and not the script: a virtual environment need not be activated.
    command = [sys.executable, "-m", "dagster", "dev", "-m", "propensity_dagster.definitions"]
    command += ["-h", "127.0.0.1", "-p", str(port)]
    started: list[subprocess.Popen[bytes]] = []

    def stop(number: int, _: object) -> None:
        for process in started:
            process.send_signal(number)

    # Before the start: a process inherits that a signal is ignored, as behind a shell's `&`, but no handler.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    # A session of its own: a Ctrl-C reaches Dagster once, from us, and it ends its processes in order.
    started.append(subprocess.Popen(command, env=environment, start_new_session=True))
    raise typer.Exit(started[0].wait())


@app.command()
def serve(
    campaign: Annotated[
        str | None, typer.Argument(metavar="CAMPAIGN", help="Whose answers the plain paths give, if not the default's.")
    ] = None,
    port: Annotated[int, typer.Option(help="Port of the service.")] = 3000,
    host: Annotated[str, typer.Option(help="Address; another than this machine's own needs API keys.")] = "127.0.0.1",
) -> None:
    """Answer over HTTP with the champions of the home folder; stop with Ctrl-C. Documentation is at /."""
    from propensity_dagster.serving.publish.serve import preferred_campaign, serving_command

    home = Home.from_environment().ensure()
    default = find_campaign(campaign).name if campaign else preferred_campaign(home, DEFAULT_CAMPAIGN)
    command = serving_command(home, default, host, port)
    os.execve(sys.executable, command, {**_environment(None), **({_DEFAULT: default} if default else {})})


@app.command()
def rollout(
    campaign: CampaignArgument,
    mode: Annotated[str, typer.Option(help="off, shadow (score and log) or split (answer a share).")] = "shadow",
    share: Annotated[float, typer.Option(help="Share of customers the challenger answers, in split.")] = 0.1,
    version: Annotated[str | None, typer.Option(help="The challenger; the newest version, if absent.")] = None,
) -> None:
    """Serve a challenger beside the champion."""
    from propensity_dagster.serving.publish.releases import MODES, set_rollout

    if mode not in MODES:
        raise ConfigError(f"--mode must be one of {', '.join(MODES)}, got {mode!r}")
    report = set_rollout(find_campaign(campaign), Home.from_environment(), _store(), MODES[mode], share, version)
    against = f", challenger version {report.challenger_version}" if report.challenger_version else ""
    of = f" of {share:.1%}" if mode == "split" else ""
    print(f"{campaign}: champion version {report.champion_version}{against}: {report.mode}{of}")


@key_app.command("add")
def key_add(name: Annotated[str, typer.Argument(help="Whom the key is for.")]) -> None:
    """Make a key. It is printed once; the home folder keeps its hash."""
    from propensity_dagster.serving.publish.keys import add_key

    print(add_key(Home.from_environment().ensure().serving, name))


@key_app.command("remove")
def key_remove(name: Annotated[str, typer.Argument(help="Name of the key.")]) -> None:
    """Make a key worthless, at once and without a restart."""
    from propensity_dagster.serving.publish.keys import remove_key

    remove_key(Home.from_environment().serving, name)


@key_app.command("list")
def key_list() -> None:
    """Show the names of the keys and when they were made."""
    from propensity_dagster.serving.settings import read_keys

    for entry in read_keys(Home.from_environment().serving).entries:
        print(f"{entry.name}  {entry.created}")


@champion_app.command("show")
def champion_show(campaign: CampaignArgument = DEFAULT_CAMPAIGN) -> None:
    """Show the champion, and every registered version."""
    chosen = find_campaign(campaign)
    store = _store()
    versions = store.versions(chosen.name)
    if not versions:
        raise ConfigError(f"{chosen.name}: no model has been registered yet; run the training job first")
    table = Table(title=f"Models of {chosen.name}", title_justify="left")
    for column in ("version", "model", "aliases", "identity"):
        table.add_column(column)
    for version in versions:
        is_champion = "champion" in version.aliases
        aliases = ", ".join(version.aliases)
        table.add_row(version.version, version.model, aliases, version.identity, style="bold" if is_champion else "")
    _console().print(table)


@champion_app.command("history")
def champion_history(campaign: CampaignArgument = DEFAULT_CAMPAIGN) -> None:
    """Show every promotion, refusal and rollback, oldest first."""
    chosen = find_campaign(campaign)
    table = Table(title=f"History of {chosen.name}", title_justify="left")
    for column in ("#", "at (UTC)", "what", "version", "before", "why"):
        table.add_column(column)
    for event in _store().history(chosen.name):
        at = event.at.replace("+00:00", "").replace("T", " ")
        table.add_row(str(event.number), at, event.action, event.version, event.previous or "", event.why)
    _console().print(table)


@champion_app.command("rollback")
def champion_rollback(
    campaign: CampaignArgument = DEFAULT_CAMPAIGN,
    to: Annotated[str | None, typer.Option(help="Version to go back to; the one before, if absent.")] = None,
    why: Annotated[str, typer.Option(help="Reason, kept in the history.")] = "by hand",
) -> None:
    """Make the champion before the present one the champion again."""
    chosen = find_campaign(campaign)
    store = _store()
    event = store.roll_back(chosen.name, to, why)
    from propensity_dagster.serving.publish.releases import publish_release

    publish_release(chosen, Home.from_environment(), store)
    print(f"{chosen.name}: version {event.version} is the champion again; before: version {event.previous}")


@experiment_app.command("power")
def experiment_power(
    rate: Annotated[float, typer.Option(min=0, max=1, help="Conversion rate without the treatment.")],
    effect: Annotated[float, typer.Option(min=0, help="Relative change worth finding: 0.1 is 10% more.")],
    share: Annotated[float, typer.Option(min=0, max=1, help="Share of units that get the treatment.")] = 0.5,
    daily: Annotated[float | None, typer.Option(min=0, help="New units a day.")] = None,
    alpha: Annotated[float, typer.Option(min=0, max=0.5, help="Chance of a false alarm.")] = 0.05,
    wanted: Annotated[float, typer.Option("--power", min=0.5, max=1, help="Chance of finding the effect.")] = 0.8,
    explained: Annotated[float, typer.Option(min=0, max=1, help="Variance that the propensity score explains.")] = 0.0,
    planned: Annotated[int, typer.Option(min=1, help="Units expected in all.")] = 10_000,
) -> None:
    """How many units, and days, it takes to find an effect on a conversion rate."""
    from propensity_dagster.experiments.power import power

    more = rate * (1 + effect)
    found = power(
        rate, rate * (1 - rate), effect, share, alpha, wanted, explained, daily, planned, treated=more * (1 - more)
    )
    days, peeking = (f", {n:,} days" if n is not None else "" for n in (found.days, found.days_peeking))
    print(f"looked at once, at the end: {found.units:,} units{days}")
    print(f"looked at every day (always-valid intervals): {found.units_peeking:,} units{peeking}")
    print(f"with {planned:,} units, looked at once, an effect of {found.effect:.1%} is found")


@experiment_app.command("readout")
def experiment_readout(
    campaign: CampaignArgument,
    name: Annotated[str, typer.Argument(metavar="EXPERIMENT", help="Its name in the campaign file.")],
) -> None:
    """What an experiment shows so far: what happened, how sure, what to do. Writes its page."""
    from propensity_dagster.campaign import EventCampaign
    from propensity_dagster.experiments.measurement import publish_readout
    from propensity_dagster.reports.experiment_page import publish_experiment_page
    from propensity_dagster.runtime import Runtime

    chosen, runtime = find_campaign(campaign), Runtime.from_environment()
    if not isinstance(chosen, EventCampaign) or name not in chosen.experiments:
        there = ", ".join(chosen.experiments) or "none"
        raise ConfigError(f"{chosen.file}: there is no experiment {name!r}; there are {there}")
    with runtime.local_engine() as engine:
        record = publish_readout(chosen, name, runtime.home, engine)
    words = record["recommendation"]
    for part in ("happened", "sure", "do"):
        print(words[part])
    print(publish_experiment_page(chosen, name, record, runtime.home))


@alerts_app.command("list")
def alerts_list(
    campaign: Annotated[str | None, typer.Argument(metavar="CAMPAIGN", help="One campaign; all, if absent.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Those that are over too.")] = False,
) -> None:
    """Show open alerts, the gravest first: what was found, why, and what to do."""
    from propensity_dagster.monitoring.alerts import read_alerts, read_settings, settings_file

    home = Home.from_environment()
    name = find_campaign(campaign).name if campaign else None
    alerts = read_alerts(home, name, only_open=not everything)
    alerts.sort(key=lambda a: (a.resolved_at is not None, a.finding.severity != "alert"))
    if not alerts:
        print("nothing has been found" if everything else "no alert is open")
        return
    table = Table(show_lines=True)
    for column in ("severity", "campaign", "since", "until", "found"):
        table.add_column(column)
    for alert in alerts:
        found = alert.finding
        until = alert.resolved_at[:10] if alert.resolved_at else "open"
        words = (found.sentence, f"Probable cause: {found.cause}" if found.cause else "", found.advice)
        table.add_row(
            found.severity, alert.campaign, str(alert.snapshot), until, "\n".join(word for word in words if word)
        )
    _console().print(table)
    if not read_settings(home).channels:
        print(f"Nobody is told: {settings_file(home)} names no channel yet; docs/guide.md shows one.")


@alerts_app.command("test")
def alerts_test() -> None:
    """Send a test message to every channel of alerts/settings.yaml, and say which took it."""
    from propensity_dagster.monitoring.alerts import read_settings, send, settings_file

    home = Home.from_environment()
    channels = read_settings(home).channels
    if not channels:
        raise ConfigError(f"{settings_file(home)}: there is no channel yet; docs/guide.md shows one")
    failed = 0
    for channel in channels:
        error = send(channel, "Propensity: a test", "This channel is told of alerts. Nothing is wrong.")
        failed += error is not None
        print(f"{channel.name}: {error or 'sent'}")
    if failed:
        raise ConfigError(f"{failed} of {len(channels)} channels did not take the message")


def main() -> None:
    """Run the command line; a user's mistake is one message and exit status 1, never a stack trace."""
    try:
        app()
    except PropensityError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def _launch(campaign: Campaign, *options: str) -> None:
    """Run a campaign in a Dagster process of its own."""
    command = [sys.executable, "-m", "propensity_dagster.components.launch", campaign.name, *options]
    status = subprocess.run(command, env=_environment(campaign), check=False).returncode
    if status < 0:
        print(f"error: {campaign.name}: the run was killed (signal {-status}); run it again", file=sys.stderr)
    if status:
        raise typer.Exit(status)


def _date(text: str) -> str:
    try:
        return str(date.fromisoformat(text))
    except ValueError:
        raise ConfigError(f"--snapshot must be a date such as 2025-01-31, got {text!r}") from None


def _environment(campaign: Campaign | None) -> dict[str, str]:
    """Environment of a Dagster process: its home prepared, telemetry off, the campaign's folder chosen."""
    home = Home.from_environment().ensure()
    dagster_home = home.root / "dagster"
    dagster_home.mkdir(exist_ok=True)
    settings = dagster_home / "dagster.yaml"
    if not settings.exists():
        publish_text(files("propensity_dagster").joinpath("dagster.yaml").read_text(encoding="utf-8"), settings)
    quiet = {"DO_NOT_TRACK": "1", "MLFLOW_DISABLE_TELEMETRY": "true", "BENTOML_DO_NOT_TRACK": "true"}
    chosen = {CAMPAIGNS: str(campaign.file)} if campaign and campaign.file.parent != SHIPPED.resolve() else {}
    return {
        **os.environ,
        "PROPENSITY_HOME": str(home.root),
        "DAGSTER_HOME": str(dagster_home),
        **quiet,
        **chosen,
    }


def _console() -> Console:
    """A terminal's own width, else one that fits the tables."""
    console = Console()
    return console if console.is_terminal else Console(width=110)


def _store():
    from propensity_dagster.registry.mlflow_store import MlflowStore

    return MlflowStore(Home.from_environment())


if __name__ == "__main__":
    main()
