"""Alerts: told once, told again when graver or over, never lost; to a real webhook and a real SMTP server."""

import os
import socketserver
import subprocess
import sys
import threading
from datetime import UTC, date, datetime, timedelta

import pytest
import yaml

from propensity_dagster.data.lake import Home
from propensity_dagster.errors import ConfigError
from propensity_dagster.monitoring.alerts import (
    deliver_alerts,
    raise_once,
    read_alerts,
    read_settings,
    record_findings,
)
from propensity_dagster.monitoring.findings import Finding
from propensity_dagster_tests.served import Webhook

NIGHT, NOW = date(2025, 3, 1), datetime(2025, 3, 1, 4, tzinfo=UTC)
DRIFTED = Finding("drift", "age", "alert", "age moved", "it has 30% of the model's importance", "Ask.", {"value": 0.4})
ODD = Finding("quality", "visits rows", "warn", "visits has 3 rows")


class Mail(socketserver.StreamRequestHandler):
    """As much of SMTP (RFC 5321) as it takes to receive a mail."""

    def handle(self):
        self.wfile.write(b"220 here\r\n")
        while line := self.rfile.readline():
            word = line[:4].upper()
            if word == b"DATA":
                self.wfile.write(b"354 go on\r\n")
                text = b""
                while (part := self.rfile.readline()) != b".\r\n":
                    text += part
                self.server.mails.append(text.decode())
            elif word == b"QUIT":
                self.wfile.write(b"221 bye\r\n")
                return
            self.wfile.write(b"250 ok\r\n")


@pytest.fixture
def webhook():
    hook = Webhook()
    yield hook
    hook.server.shutdown()
    hook.server.server_close()


@pytest.fixture
def home(tmp_path):
    return Home(tmp_path / "home").ensure()


def channels(home, *stated):
    folder = home.root / "alerts"
    folder.mkdir(exist_ok=True)
    (folder / "settings.yaml").write_text(yaml.safe_dump({"channels": list(stated)}))


def night(home, *findings, day=0, campaign="shop", sources=("drift", "quality")):
    at = NOW + timedelta(days=day)
    return record_findings(campaign, NIGHT + timedelta(days=day), sources, findings, home, at)


def deliver(home, day=0.0):
    return deliver_alerts(home, NOW + timedelta(days=day, minutes=1))


def test_a_finding_is_told_once_and_its_end_too(home, webhook):
    channels(home, {"name": "team", "url": webhook.url})
    assert night(home, DRIFTED) == ["raised: drift: age"]
    assert deliver(home).sent == 1
    assert night(home, DRIFTED) == [], "the same night again"
    assert night(home, DRIFTED, day=1) == [], "it lasts"
    assert deliver(home, 1).sent == 0
    (told,) = webhook.messages
    assert (told["title"], told["type"]) == ("Propensity, shop: 1 alert", "failure")
    for words in (
        "ALERT shop, snapshot 2025-03-01, drift: age moved.",
        "Probable cause: it has 30%",
        "Ask.",
        "/shop/monitoring.html",
    ):
        assert words in told["message"]
    assert night(home, day=2) == ["resolved: drift: age"]
    assert deliver(home, 2).sent == 1
    assert "RESOLVED shop, snapshot 2025-03-03" in webhook.messages[-1]["message"]
    assert webhook.messages[-1]["type"] == "success"
    (alert,) = read_alerts(home, "shop")
    assert (alert.snapshot, alert.last_snapshot) == (NIGHT, NIGHT + timedelta(days=1))
    assert alert.resolved_at


def test_other_sources_and_campaigns_are_left_alone(home):
    night(home, DRIFTED, ODD)
    night(home, DRIFTED, campaign="other")
    assert night(home, day=1, sources=("quality",)) == ["resolved: quality: visits rows"]
    assert {(a.campaign, a.finding.key) for a in read_alerts(home, only_open=True)} == {
        ("shop", "drift: age"),
        ("other", "drift: age"),
    }


def test_a_backfill_of_the_past_tells_nobody(home):
    night(home, DRIFTED, day=5)
    assert night(home, ODD, day=2) == []
    assert [a.finding.key for a in read_alerts(home)] == ["drift: age"]


def test_routing_by_severity_and_campaign(home, webhook):
    other = Webhook()
    channels(
        home,
        {"name": "grave", "url": webhook.url},
        {"name": "all of other", "url": other.url, "severities": ["alert", "warn"], "campaigns": ["other"]},
    )
    night(home, DRIFTED, ODD)
    night(home, ODD, campaign="other")
    assert deliver(home).sent == 2
    assert webhook.titles == ["Propensity, shop: 1 alert"]
    assert other.titles == ["Propensity, other: 1 warning"]
    other.server.shutdown()


def test_a_warning_that_becomes_an_alert_is_told(home, webhook):
    channels(home, {"name": "team", "url": webhook.url})
    night(home, ODD)
    assert deliver(home).sent == 0
    grave = Finding("quality", "visits rows", "alert", "visits has no rows")
    assert night(home, grave, day=1) == ["escalated: quality: visits rows"]
    assert deliver(home, 1).sent == 1
    assert "visits has no rows" in webhook.messages[0]["message"]


def test_nothing_is_lost_while_a_channel_is_down(home, webhook):
    channels(home, {"name": "team", "url": webhook.url})
    webhook.down = True
    night(home, DRIFTED)
    report = deliver(home)
    assert (report.sent, report.waiting) == (0, 1)
    assert report.failed == {"team": "the service did not take the message, or nobody answers at its address"}
    assert deliver(home).failed == {}, "not before the pause is over"
    assert deliver(home, 0.1).failed, "tried again"
    webhook.down = False
    assert deliver(home, 0.101).sent == 0, "the pause has grown"
    assert deliver(Home(home.root), 1).sent == 1, "another process, a day later"
    assert len(webhook.messages) == 1


def test_what_keeps_coming_back_is_not_told_each_time(home, webhook):
    channels(home, {"name": "team", "url": webhook.url, "cool_down_hours": 72})
    for day in range(4):
        night(home, *([DRIFTED] if day % 2 == 0 else []), day=day)
        deliver(home, day)
    assert webhook.titles == ["Propensity, shop: 1 alert", "Propensity, shop: 1 resolved"]
    night(home, DRIFTED, day=4)
    deliver(home, 4)
    assert webhook.titles[2:] == ["Propensity, shop: 1 alert"], "the cool-down is over"


def test_a_digest_is_one_message(home, webhook):
    channels(home, {"name": "team", "url": webhook.url, "severities": ["alert", "warn"], "digest_hours": 24})
    night(home, DRIFTED)
    deliver(home)
    night(home, DRIFTED, ODD, day=0)
    night(home, DRIFTED, campaign="other")
    assert deliver(home, 0.5).sent == 0
    assert deliver(home, 1.1).sent == 1
    assert webhook.titles[-1] == "Propensity, other, shop: 1 alert, 1 warning"


def test_alerts_wait_for_the_first_channel(home, webhook):
    night(home, DRIFTED)
    assert deliver(home).sent == 0
    channels(home, {"name": "team", "url": webhook.url})
    assert deliver(home).sent == 1


def test_failed_runs_are_told_and_are_over(home, webhook):
    channels(home, {"name": "team", "url": webhook.url})
    failed = Finding("run", "shop__score failed", "alert", "the run abc failed")
    for hour in range(3):  # retried each hour: told once a day
        raise_once("shop", NIGHT, failed, home, NOW + timedelta(hours=hour))
        deliver_alerts(home, NOW + timedelta(hours=hour, minutes=1))
    assert webhook.titles == ["Propensity, shop: 1 alert"]
    assert read_alerts(home, only_open=True) == []


def test_mail_arrives(home):
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Mail) as server:
        server.mails, server.daemon_threads = [], True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.server_address[1]
        url = f"mailto://127.0.0.1:{port}?from=propensity@example.com&to=team@example.com&mode=insecure&smtp=127.0.0.1"
        channels(home, {"name": "mail", "url": url})
        night(home, DRIFTED)
        report = deliver(home)
        assert (report.sent, report.failed) == (1, {})
        (mail,) = server.mails
        server.shutdown()
    assert "Subject: Propensity, shop: 1 alert" in mail
    assert "To: team@example.com" in mail


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"channels": [{"name": "a", "url": "json://h", "severity": "alert"}]}, "channels.0.severity: unknown key; did you mean 'severities'?; allowed are name, url"),
        ({"channels": [{"name": "a", "url": "json://h", "severities": ["bad"]}]}, "channels.0.severities.0: Input should be 'alert' or 'warn', got 'bad'"),
        ({"channels": "json://h"}, "channels: Input should be a valid tuple"),
        ({"channels": [{"name": "a"}]}, "channels.0.url: required key is missing"),
        ({"channels": [{"name": "a", "url": "x"}, {"name": "a", "url": "y"}]}, "names must differ"),
    ],
)  # fmt: skip
def test_wrong_settings_are_told_without_the_address(home, settings, message):
    folder = home.root / "alerts"
    folder.mkdir()
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(ConfigError, match=r"settings\.yaml") as error:
        read_settings(home)
    assert message in str(error.value)
    assert "json://h" not in str(error.value)


@pytest.mark.parametrize(
    ("url", "error"),
    [
        ("json://${NO_SUCH_SECRET}@127.0.0.1", "environment variable NO_SUCH_SECRET is not set"),
        ("nonsense", "its url is not an address that apprise knows"),
    ],
)
def test_a_wrong_address_stops_no_other_channel(home, webhook, url, error):
    channels(home, {"name": "wrong", "url": url}, {"name": "team", "url": webhook.url})
    night(home, DRIFTED)
    report = deliver(home)
    assert report.sent == 1
    assert error in report.failed["wrong"]


def test_the_command_line_lists_alerts_and_tries_channels(home, webhook):
    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "propensity_dagster.cli", "alerts", *arguments],
            capture_output=True, text=True, check=False, timeout=60,
            env={**os.environ, "PROPENSITY_HOME": str(home.root), "COLUMNS": "110"},
        )  # fmt: skip

    assert run("list").stdout == "no alert is open\n"
    nobody = run("test")
    assert (nobody.returncode, "there is no channel yet" in nobody.stderr) == (1, True)
    night(home, DRIFTED, ODD)
    night(home, ODD, day=1)
    shown = run("list").stdout
    assert "visits has 3 rows" in shown
    assert "age moved" not in shown
    assert "age moved" in run("list", "--all").stdout
    channels(home, {"name": "team", "url": webhook.url, "severities": "warn"}, {"name": "wrong", "url": "nonsense"})
    tried = run("test")
    assert tried.returncode == 1
    assert "team: sent" in tried.stdout
    assert "1 of 2 channels did not take the message" in tried.stderr
    assert webhook.titles == ["Propensity: a test"]
