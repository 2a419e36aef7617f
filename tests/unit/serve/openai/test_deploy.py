"""The unit and the manifest: their flags are the command's, and their probes are routes."""

import configparser
import shlex
import shutil
import subprocess
from pathlib import Path

import httpx
import pytest
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


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_the_unit_is_one_to_systemd(tmp_path):
    unit = (DEPLOY / "saw-serve.service").read_text()
    copy = tmp_path / "saw-serve.service"
    copy.write_text(unit.replace("/opt/saw/bin/saw-serve", shutil.which("true")))
    found = subprocess.run(["systemd-analyze", "verify", copy], capture_output=True, text=True)
    # It looks at the machine's own units too, and has something to say of some of them.
    assert [line for line in (found.stdout + found.stderr).splitlines() if copy.name in line] == []


@pytest.mark.parametrize("file", ["kubernetes.yaml", "kuberay.yaml"])
def test_the_manifests_meet_the_schemas_of_kubernetes(file):
    """The schemas are 100 MB, so they are no part of the test's packages: pip install kubernetes-validate."""
    validate = pytest.importorskip("kubernetes_validate")
    for document in yaml.safe_load_all((DEPLOY / file).read_text()):
        if not document["apiVersion"].startswith("ray.io/"):  # its own schema is in Ray's operator
            validate.validate(document, validate.latest_version(), strict=True)


def test_the_manifest_starts_the_command_and_asks_its_routes(url):
    deployment, service = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
    pod = deployment["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert answers_of(make_parser().parse_args(container["args"]), pod, service, url) == [200, 200]


def test_kuberays_manifest_starts_the_command_over_all_gpus(url):
    cluster, service = yaml.safe_load_all((DEPLOY / "kuberay.yaml").read_text())
    pod = cluster["spec"]["headGroupSpec"]["template"]["spec"]
    script = pod["containers"][0]["args"][0]
    command = shlex.split(script.splitlines()[-1])
    assert command[:2] == ["exec", "saw-serve"]
    assert answers_of(make_parser().parse_args(command[2:]), pod, service, url) == [200, 200]
    (workers,) = cluster["spec"]["workerGroupSpecs"]
    limits = workers["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert f"< {workers['replicas'] * int(limits['nvidia.com/gpu'])})" in script


def answers_of(args, pod, service, url):
    """What a server answers where a pod's probes and its metrics are asked for, whose port the command has."""
    [container] = pod["containers"]
    assert args.timeout_graceful_shutdown < pod["terminationGracePeriodSeconds"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports["http"] == args.port == service["spec"]["ports"][0]["port"]
    paths = {container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")}
    paths.add(service["metadata"]["annotations"]["prometheus.io/path"])
    return [httpx.get(url + path, timeout=60).status_code for path in sorted(paths)]
