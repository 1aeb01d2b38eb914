//! The DaemonSet's pod as options of `podman run`. A field that has no translation is an error, so that the container
//! has what the manifest says and nothing else.

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Map, Value};

/// What a container runtime makes of the pod.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Pod {
    /// Options of `podman run`.
    pub(super) options: Vec<String>,
    /// The arguments of the daemon.
    pub(super) args: Vec<String>,
    /// The names of the capabilities, sorted.
    pub(super) capabilities: Vec<String>,
    pub(super) metrics_port: u16,
    pub(super) grace_seconds: u64,
}

/// The node's name in events.
pub(super) const NODE: &str = "node-of-the-check";

impl Pod {
    /// Finds it among the objects of the manifest.
    pub(super) fn of_daemon_set(objects: &[Value]) -> Result<Self> {
        let daemon_set = objects.iter().find(|object| object["kind"] == "DaemonSet");
        let spec = &daemon_set.context("the manifest has no DaemonSet")?["spec"]["template"]["spec"];
        let container = &spec["containers"][0];
        let mut options = Vec::new();
        for (key, value) in fields(spec)? {
            match (key.as_str(), value) {
                ("hostPID", Value::Bool(true)) => options.push("--pid=host".to_owned()),
                // About the cluster.
                ("serviceAccountName" | "automountServiceAccountToken" | "priorityClassName", _)
                | ("nodeSelector" | "tolerations" | "terminationGracePeriodSeconds" | "volumes", _) => {}
                ("containers", Value::Array(containers)) if containers.len() == 1 => {}
                _ => bail!("the pod's {key} has no translation: {value}"),
            }
        }
        // A pod has a network namespace of its own. Nobody needs to reach it but us.
        options.push("--network=none".to_owned());
        let capabilities = security(&container["securityContext"], &mut options)?;
        for (key, value) in fields(container)? {
            match key.as_str() {
                "env" => options.extend(environment(value)?),
                "resources" => options.push(memory(value)?),
                "volumeMounts" => options.extend(mounts(value, &spec["volumes"])?),
                "name" | "image" | "args" | "ports" | "readinessProbe" | "securityContext" => {}
                _ => bail!("the container's {key} has no translation: {value}"),
            }
        }
        let port = container["ports"][0]["containerPort"].as_u64().context("no port")?;
        Ok(Self {
            options,
            args: texts(&container["args"])?,
            capabilities,
            metrics_port: port.try_into().context("the port")?,
            grace_seconds: grace_seconds(spec)?,
        })
    }

    /// The pod with the patch of the guard's component, set to refuse.
    pub(super) fn with_guard(&self, objects: &[Value]) -> Result<Self> {
        let spec = &objects.first().context("the patch is empty")?["spec"]["template"]["spec"];
        let container = &spec["containers"][0];
        for (key, value) in fields(spec)?.iter().chain(fields(container)?) {
            let is_known =
                ["terminationGracePeriodSeconds", "containers", "name", "args"].contains(&key.as_str());
            ensure!(is_known, "the patch's {key} has no translation: {value}");
        }
        let mut args = texts(&container["args"])?;
        ensure!(args.ends_with(&["--guard".into(), "dry-run".into()]), "the patch's arguments: {args:?}");
        args.pop();
        args.push("refuse".to_owned());
        Ok(Self { args, grace_seconds: grace_seconds(spec)?, ..self.clone() })
    }
}

fn grace_seconds(spec: &Value) -> Result<u64> {
    spec["terminationGracePeriodSeconds"].as_u64().context("no grace period")
}

/// Adds the options of the security context. Returns the capabilities.
fn security(context: &Value, options: &mut Vec<String>) -> Result<Vec<String>> {
    let mut capabilities = Vec::new();
    for (key, value) in fields(context)? {
        match (key.as_str(), value) {
            ("privileged", Value::Bool(false)) => {}
            ("readOnlyRootFilesystem", Value::Bool(true)) => options.push("--read-only".to_owned()),
            ("runAsUser", Value::Number(user)) => options.push(format!("--user={user}")),
            ("capabilities", value) => {
                ensure!(texts(&value["drop"])? == ["ALL"], "the container keeps capabilities");
                options.push("--cap-drop=all".to_owned());
                capabilities = texts(&value["add"])?;
                options.extend(capabilities.iter().map(|name| format!("--cap-add={name}")));
            }
            ("appArmorProfile", value) if value["type"] == "Unconfined" => {
                options.push("--security-opt=apparmor=unconfined".to_owned());
            }
            // podman's default.
            ("seccompProfile", value) if value["type"] == "RuntimeDefault" => {}
            _ => bail!("the security context's {key} has no translation: {value}"),
        }
    }
    capabilities.sort();
    Ok(capabilities)
}

fn environment(variables: &Value) -> Result<Vec<String>> {
    let variable = |variable: &Value| {
        let source = &variable["valueFrom"]["fieldRef"]["fieldPath"];
        ensure!(source == "spec.nodeName", "a variable from {source}");
        Ok(format!("--env={}={NODE}", variable["name"].as_str().context("no name")?))
    };
    variables.as_array().context("env")?.iter().map(variable).collect()
}

fn memory(resources: &Value) -> Result<String> {
    let limit = resources["limits"]["memory"].as_str().and_then(|limit| limit.strip_suffix("Mi"));
    Ok(format!("--memory={}m", limit.context("no limit of memory in Mi")?))
}

/// Each mount has a volume, which is a place of the host.
fn mounts(mounts: &Value, volumes: &Value) -> Result<Vec<String>> {
    let volumes = volumes.as_array().context("volumes")?;
    let mount = |mount: &Value| {
        let volume = volumes.iter().find(|volume| volume["name"] == mount["name"]);
        let volume = volume.with_context(|| format!("{}: no such volume", mount["name"]))?;
        let from = volume["hostPath"]["path"].as_str().context("a volume that is not the host's")?;
        let to = mount["mountPath"].as_str().context("no path")?;
        ensure!(mount["readOnly"] == true, "{to} can be written");
        Ok(format!("--volume={from}:{to}:ro"))
    };
    mounts.as_array().context("volumeMounts")?.iter().map(mount).collect()
}

fn fields(value: &Value) -> Result<&Map<String, Value>> {
    value.as_object().with_context(|| format!("not an object: {value}"))
}

fn texts(value: &Value) -> Result<Vec<String>> {
    serde_json::from_value(value.clone()).with_context(|| format!("not a list of texts: {value}"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn manifest() -> Vec<Value> {
        let container = json!({
            "name": "selfconn", "image": "selfconn:1", "args": ["run"], "ports": [{ "containerPort": 21435 }],
            "env": [{ "name": "NODE_NAME", "valueFrom": { "fieldRef": { "fieldPath": "spec.nodeName" } } }],
            "securityContext": {
                "privileged": false, "readOnlyRootFilesystem": true, "runAsUser": 0,
                "capabilities": { "drop": ["ALL"], "add": ["PERFMON", "BPF"] },
                "appArmorProfile": { "type": "Unconfined" }, "seccompProfile": { "type": "RuntimeDefault" }
            },
            "resources": { "limits": { "memory": "128Mi" } },
            "volumeMounts": [{ "name": "id", "mountPath": "/etc/id", "readOnly": true }]
        });
        let spec = json!({
            "hostPID": true, "terminationGracePeriodSeconds": 10, "containers": [container],
            "volumes": [{ "name": "id", "hostPath": { "path": "/etc/machine-id" } }]
        });
        vec![
            json!({ "kind": "Namespace" }),
            json!({ "kind": "DaemonSet", "spec": { "template": { "spec": spec } } }),
        ]
    }

    #[test]
    fn each_field_of_the_pod_becomes_an_option() {
        let mut pod = Pod::of_daemon_set(&manifest()).unwrap();
        pod.options.sort();
        let options = [
            "--cap-add=BPF",
            "--cap-add=PERFMON",
            "--cap-drop=all",
            "--env=NODE_NAME=node-of-the-check",
            "--memory=128m",
            "--network=none",
            "--pid=host",
            "--read-only",
            "--security-opt=apparmor=unconfined",
            "--user=0",
            "--volume=/etc/machine-id:/etc/id:ro",
        ];
        assert_eq!(pod.options, options);
        assert_eq!((pod.args, pod.capabilities), (vec!["run".into()], vec!["BPF".into(), "PERFMON".into()]));
        assert_eq!((pod.metrics_port, pod.grace_seconds), (21435, 10));
    }

    #[test]
    fn the_patch_of_the_guard_replaces_arguments_and_grace_period() {
        let pod = Pod::of_daemon_set(&manifest()).unwrap();
        let patch = |args: Value, key: &str| {
            let container = json!({ "name": "selfconn", "args": args, key: "selfconn" });
            let spec = json!({ "terminationGracePeriodSeconds": 30, "containers": [container] });
            vec![json!({ "spec": { "template": { "spec": spec } } })]
        };
        let guarded = pod.with_guard(&patch(json!(["run", "--guard", "dry-run"]), "name")).unwrap();
        assert_eq!((guarded.args.join(" "), guarded.grace_seconds), ("run --guard refuse".into(), 30));
        assert_eq!((guarded.options, guarded.capabilities), (pod.options.clone(), pod.capabilities.clone()));
        assert!(pod.with_guard(&patch(json!(["run"]), "name")).is_err(), "no guard");
        assert!(pod.with_guard(&patch(json!(["run", "--guard", "dry-run"]), "image")).is_err());
    }

    #[test]
    fn a_field_without_a_translation_is_refused() {
        let container = "/spec/template/spec/containers/0";
        for (place, key, value) in [
            ("/spec/template/spec", "hostNetwork", json!(true)),
            (container, "command", json!(["sh"])),
            (&format!("{container}/securityContext"), "privileged", json!(true)),
            (&format!("{container}/securityContext"), "seccompProfile", json!({ "type": "Unconfined" })),
            (&format!("{container}/volumeMounts/0"), "readOnly", json!(false)),
            (&format!("{container}/securityContext/capabilities"), "drop", json!([])),
        ] {
            let mut objects = manifest();
            objects[1].pointer_mut(place).unwrap()[key] = value;
            assert!(Pod::of_daemon_set(&objects).is_err(), "{place} {key}");
        }
    }
}
