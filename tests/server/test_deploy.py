"""What is in deploy/: the dashboard and the alert rules speak of metrics that there are, and all of it can be read."""

from __future__ import annotations

import configparser
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from diskread import State
from server import config
from tests.server.test_metrics import parse

if TYPE_CHECKING:
    from tests.server.raw_client import ServerProcess

DEPLOY = Path(__file__).parents[2] / "deploy"
RULES = DEPLOY / "prometheus" / "diskread.rules.yml"
UNIT = DEPLOY / "diskread.service"
DASHBOARD: dict[str, Any] = json.loads((DEPLOY / "grafana" / "diskread.json").read_text("utf-8"))

OF_PROMETHEUS = {"up"}
"""What Prometheus itself says of each target."""

# What else is a word in PromQL: strings, what is in braces or brackets, lists of labels, functions, operators, numbers.
NO_METRIC = re.compile(
    r'"[^"]*"|\{[^}]*\}|\[[^]]*\]|\b(?:by|on|without|ignoring)\s*\([^)]*\)|\b\w+\s*(?=\()'
    r"|\b(?:and|or|unless|offset|by|on|bool|sum|min|max|\d\w*)\b"
)


def of_dashboard() -> list[str]:
    """Every expression of the dashboard, with a value for each of Grafana's variables."""
    found = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    found += [each["expr"] for each in DASHBOARD["annotations"]["list"]]
    found += [
        re.fullmatch(r"label_values\((.*), *\w+\)", each["definition"])[1]  # type: ignore[index]
        for each in DASHBOARD["templating"]["list"]
        if each["type"] == "query"
    ]
    return [
        re.sub(r"\$__(rate_)?interval", "5m", each).replace("$instance", ".*").replace("$disk", ".*") for each in found
    ]


def of_rules() -> list[str]:
    """Every expression of the alert rules: what follows `expr:`, on its line or indented below it."""
    found = re.findall(r"^( +)expr: (?:\|\n((?:\1  .*\n)+)|(.*)\n)", RULES.read_text("utf-8"), re.MULTILINE)
    assert len(found) == RULES.read_text("utf-8").count("- alert:") > 5
    return [block or line for _, block, line in found]


def metrics_in(expression: str) -> set[str]:
    return set(re.findall(r"[A-Za-z_:][\w:]*", NO_METRIC.sub(" ", expression)))


def promtool(*arguments: str | Path) -> None:
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("no promtool (Debian's package prometheus)")
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def samples(server: ServerProcess) -> set[str]:
    """The names of all samples that /metrics can have, also of those that need an error to be there."""
    endings = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum")}
    families = parse(server.http("/metrics").body.decode()).values()
    return {family.name + ending for family in families for ending in endings.get(family.type, ("",))}


def test_finds_the_metrics_of_an_expression() -> None:
    expression = (
        'sum by (a, le) (rate(x_bucket{a="b_c", d=~"e"}[5m])) / 2 > 1.5 and on (job) y_total offset 1h unless up'
    )
    assert metrics_in(expression) == {"x_bucket", "y_total", "up"}


@pytest.mark.parametrize("expression", [*of_dashboard(), *of_rules()])
def test_every_metric_exists(expression: str, samples: set[str]) -> None:
    used = metrics_in(expression)
    assert used
    assert used <= samples | OF_PROMETHEUS
    states = set(re.findall(r'diskread_state="([^"]*)"', expression))
    assert states <= {state.value for state in State}


def test_prometheus_reads_the_rules() -> None:
    promtool("check", "rules", RULES)


def test_the_rules_say_which_disk_and_since_when() -> None:
    promtool("test", "rules", RULES.with_name("diskread.rules.test.yml"))
    tested = RULES.with_name("diskread.rules.test.yml").read_text("utf-8")
    for alert in re.findall(r"- alert: (\w+)", RULES.read_text("utf-8")):
        assert f"alertname: {alert}\n" in tested, f"no test in which {alert} fires"


def test_prometheus_reads_the_dashboard(tmp_path: Path) -> None:
    rules = tmp_path / "dashboard.yml"
    records = [{"record": f"panel:{number}", "expr": each} for number, each in enumerate(of_dashboard())]
    rules.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": records}]}))  # JSON is YAML
    promtool("check", "rules", rules)


def test_the_dashboard_has_a_place_for_every_panel() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24, panel["title"]
        taken |= cells


def test_the_example_configuration_is_one_and_the_unit_gives_it_time() -> None:
    loaded = config.load(DEPLOY / "diskread.toml")
    unit = configparser.RawConfigParser(strict=False)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(UNIT)
    service = unit["Service"]
    assert loaded.drain_timeout < int(service["TimeoutStopSec"])
    assert service["Type"] == "notify"
    assert int(service["LimitNOFILE"]) > 2 * loaded.connections
    assert loaded.admin_socket is not None
    assert loaded.admin_socket.startswith(f"/run/{service['RuntimeDirectory']}/")
    assert "serve --config" in service["ExecStart"]


def test_the_unit_is_as_closed_as_it_says() -> None:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("no systemd-analyze")
    done = subprocess.run(
        [program, "security", "--offline=true", "--threshold=20", UNIT],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-300:] + done.stderr
    stated = re.search(r"\(systemd 252\): (\S+ \w+)", UNIT.read_text("utf-8"))
    assert stated
    version = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
    if version.startswith("systemd 252"):
        assert f"exposure level for diskread.service: {stated[1]}" in done.stdout
