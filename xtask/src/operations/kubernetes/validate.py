"""Validates the manifests of packaging/kubernetes: `validate.py FOLDER`, or `validate.py FOLDER EXAMPLE`.

FOLDER is packaging. With EXAMPLE, what kustomize makes of the manifests is validated, too: EXAMPLE is docs/install.md,
which has an example of a kustomization. Unknown fields are errors. The objects of Kubernetes are validated for each
version from 1.30 on, because the field `appArmorProfile` came with it. The last line says what was validated.
"""

import asyncio
import importlib.metadata
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import tempfile

import jsonschema
import kubernetes_validate
import kubernetes_validate.utils
import yaml
from cloudcoil.models.prometheus_operator import v1 as operator

FIRST_MINOR_VERSION = 30
OPERATOR_KINDS = {"PodMonitor": operator.PodMonitor, "PrometheusRule": operator.PrometheusRule}


def versions():
    """The versions of Kubernetes that have schemas: ["1.30", "1.31", ...]."""
    known = {kubernetes_validate.utils.major_minor(name) for name in kubernetes_validate.utils.all_versions()}
    minors = sorted(int(version.removeprefix("1.")) for version in known)
    found = [f"1.{minor}" for minor in minors if minor >= FIRST_MINOR_VERSION]
    assert len(found) >= 4, f"schemas of only {found}"
    return found


def refuse_unknown_fields(schema):
    """Sets it for each object whose fields the schema lists. A model ignores unknown fields, a strict client does not."""
    if isinstance(schema, dict):
        if "properties" in schema:
            schema.setdefault("additionalProperties", False)
        for part in schema.values():
            refuse_unknown_fields(part)
    elif isinstance(schema, list):
        for part in schema:
            refuse_unknown_fields(part)


def validate(item, where):
    """Ends the program if an object is not valid."""
    name = f"{where}: {item['kind']} {item['metadata']['name']}"
    path = lambda error: ".".join(str(part) for part in error.absolute_path)
    if item["apiVersion"] == "monitoring.coreos.com/v1":
        schema = OPERATOR_KINDS[item["kind"]].model_json_schema(by_alias=True)
        refuse_unknown_fields(schema)
        error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema).iter_errors(item))
        if error:
            sys.exit(f"{name}: prometheus-operator: {path(error)}: {error.message}")
        return
    for version in versions():
        try:
            kubernetes_validate.validate(item, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            sys.exit(f"{name}: Kubernetes {version}: {path(error)}: {error.message}")
        except kubernetes_validate.SchemaNotFoundError as error:
            sys.exit(f"{name}: {error.message}")


def build(folder):
    """What kustomize makes of a folder. The library is for x86_64 only; other machines need a kubectl."""
    if platform.machine() == "x86_64":
        import pykustomize

        return asyncio.run(pykustomize.build_json(folder)).resources
    built = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True)
    if built.returncode:
        sys.exit(f"kubectl kustomize: {built.stderr.strip()}")
    return list(yaml.safe_load_all(built.stdout))


def example(document, folder):
    """What kustomize makes of the document's example, which has our folder beside it."""
    text = re.search(r"```yaml\n(# kustomization\.yaml\n.*?)```", document.read_text(), re.DOTALL).group(1)
    with tempfile.TemporaryDirectory() as directory:
        shutil.copytree(folder, f"{directory}/kubernetes")
        pathlib.Path(directory, "kustomization.yaml").write_text(text)
        return build(directory)


def by_kind(items):
    """The objects by their kind, of which there is one each."""
    named = {item["kind"]: item for item in items}
    assert len(named) == len(items), [item["kind"] for item in items]
    return named


def check_example(items, plain, rules):
    """The components do what they are for."""
    items, plain = by_kind(items), by_kind(plain)
    assert set(items) == set(plain) | set(OPERATOR_KINDS), list(items)
    pod, plain_pod = (one["DaemonSet"]["spec"]["template"] for one in (items, plain))
    container, plain_container = (one["spec"]["containers"][0] for one in (pod, plain_pod))
    assert container["args"] == plain_container["args"] + ["--guard", "dry-run"], container["args"]
    for field in ("securityContext", "resources", "volumeMounts"):
        assert container[field] == plain_container[field], field
    assert container["image"] == plain_container["image"].replace("selfconn", "registry.example/selfconn"), container
    assert items["PrometheusRule"]["spec"] == rules, "the PrometheusRule has other rules than the rules file"
    monitor, labels = items["PodMonitor"]["spec"], pod["metadata"]["labels"]
    assert monitor["selector"]["matchLabels"].items() <= labels.items(), "the PodMonitor selects other pods"
    assert labels[monitor["jobLabel"]] == "selfconn", "the alert rules expect another job"
    ports = [port["name"] for port in container["ports"]]
    assert [endpoint["port"] for endpoint in monitor["podMetricsEndpoints"]] == ports, ports


def main():
    folder, documents = pathlib.Path(sys.argv[1]), [pathlib.Path(argument) for argument in sys.argv[2:]]
    kubernetes = folder / "kubernetes"
    plain = list(yaml.safe_load_all((kubernetes / "daemonset.yaml").read_text()))
    for item in plain:
        validate(item, "daemonset.yaml")
    if not documents:
        print(f"{len(plain)} objects pass Kubernetes {' '.join(versions())}")
        return
    rules = yaml.safe_load((folder / "prometheus/selfconn.rules.yml").read_text())
    built, complete = build(kubernetes), example(documents[0], kubernetes)
    for where, items in (("kustomization.yaml", built), ("the example", complete)):
        for item in items:
            validate(item, where)
    assert by_kind(built) == by_kind(plain), "the kustomization makes other objects than daemonset.yaml"
    check_example(complete, plain, rules)
    release = importlib.metadata.version("cloudcoil.models.prometheus_operator")
    print(
        f"{len(plain)} objects, and {len(complete)} with the components, pass Kubernetes {' '.join(versions())}"
        f" and the prometheus-operator {release.rsplit('.', 1)[0]}"
    )


main()
