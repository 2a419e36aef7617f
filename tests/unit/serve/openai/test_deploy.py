"""The unit and the manifest: their flags are the command's, and their probes are routes."""

import configparser
import shlex
from pathlib import Path

import httpx
import yaml

from saw_trtllm.cli.serve import make_parser

DEPLOY = Path(__file__).parents[4] / "examples" / "deploy"


def test_the_systemd_unit_starts_the_command():
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str
    unit.read(DEPLOY / "saw-serve.service")
    command = shlex.split(unit["Service"]["ExecStart"])
    assert Path(command[0]).name == "saw-serve"
    args = make_parser().parse_args(command[1:])
    assert args.timeout_graceful_shutdown < int(unit["Service"]["TimeoutStopSec"])


def test_the_manifest_starts_the_command_and_asks_its_routes(url):
    deployment, service = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
    pod = deployment["spec"]["template"]["spec"]
    [container] = pod["containers"]
    args = make_parser().parse_args(container["args"])
    assert args.timeout_graceful_shutdown < pod["terminationGracePeriodSeconds"]
    assert container["ports"][0]["containerPort"] == args.port == service["spec"]["ports"][0]["port"]
    paths = {container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")}
    paths.add(service["metadata"]["annotations"]["prometheus.io/path"])
    assert [httpx.get(url + path).status_code for path in sorted(paths)] == [200, 200]
