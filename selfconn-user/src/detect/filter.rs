//! Selects self-connections by rules `KEY=GLOB` over the fields of a connection. Pure.

use std::{borrow::Cow, fmt, str::FromStr, sync::Arc};

use glob::Pattern;

use crate::event::ConnectionFields;

/// A rule, such as `comm=java*`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    key: FilterKey,
    glob: Pattern,
}

/// The field that a rule matches, named as in events.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FilterKey {
    Addr,
    Cause,
    Cgroup,
    Cmdline,
    Comm,
    Container,
    Exe,
    Family,
    Ifindex,
    KernelSocket,
    Netns,
    Owner,
    Pid,
    Pod,
    Port,
    Source,
    ThreadComm,
    Uid,
    Unit,
}

const KEYS: [(&str, FilterKey); 19] = [
    ("addr", FilterKey::Addr),
    ("cause", FilterKey::Cause),
    ("cgroup", FilterKey::Cgroup),
    ("cmdline", FilterKey::Cmdline),
    ("comm", FilterKey::Comm),
    ("container", FilterKey::Container),
    ("exe", FilterKey::Exe),
    ("family", FilterKey::Family),
    ("ifindex", FilterKey::Ifindex),
    ("kernel_socket", FilterKey::KernelSocket),
    ("netns", FilterKey::Netns),
    ("owner", FilterKey::Owner),
    ("pid", FilterKey::Pid),
    ("pod", FilterKey::Pod),
    ("port", FilterKey::Port),
    ("source", FilterKey::Source),
    ("thread_comm", FilterKey::ThreadComm),
    ("uid", FilterKey::Uid),
    ("unit", FilterKey::Unit),
];

impl FromStr for Rule {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, glob) = text.split_once('=').ok_or("must be KEY=GLOB")?;
        let key = KEYS.iter().find(|(known, _)| *known == name).ok_or_else(|| {
            let names: Vec<_> = KEYS.iter().map(|(name, _)| *name).collect();
            format!("unknown key {name}: must be one of {}", names.join(", "))
        })?;
        let glob = Pattern::new(glob).map_err(|error| format!("invalid glob {glob}: {}", error.msg))?;
        Ok(Self { key: key.1, glob })
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.key.name(), self.glob)
    }
}

/// The value of a field.
enum FieldValue<'a> {
    Known(Cow<'a, str>),
    /// The word of the process only, or of whoever gave it the socket: what it does not claim is not true, and what it
    /// claims is unknown.
    Claimed(Cow<'a, str>),
    /// The connection is known to have no value for this field.
    Absent,
    Unknown,
}

impl FilterKey {
    fn name(self) -> &'static str {
        KEYS.iter().find(|(_, key)| *key == self).map_or("", |(name, _)| name)
    }

    /// True if the field describes the process, and not the socket.
    fn is_about_process(self) -> bool {
        match self {
            Self::Cgroup
            | Self::Cmdline
            | Self::Comm
            | Self::Container
            | Self::Exe
            | Self::Pid
            | Self::Pod
            | Self::ThreadComm
            | Self::Unit => true,
            Self::Addr
            | Self::Cause
            | Self::Family
            | Self::Ifindex
            | Self::KernelSocket
            | Self::Netns
            | Self::Owner
            | Self::Port
            | Self::Source
            | Self::Uid => false,
        }
    }

    /// True if the process may have got the socket from one that the field does not describe.
    fn is_of_uncertain_process(self, fields: &ConnectionFields) -> bool {
        self.is_about_process() && !fields.is_process_certain
    }

    fn value(self, fields: &ConnectionFields) -> FieldValue<'_> {
        match self.reported_value(fields) {
            FieldValue::Known(text) if self.is_of_uncertain_process(fields) => FieldValue::Claimed(text),
            value => value,
        }
    }

    /// What the event says.
    fn reported_value(self, fields: &ConnectionFields) -> FieldValue<'_> {
        fn text(text: Option<&str>) -> FieldValue<'_> {
            text.map_or(FieldValue::Unknown, |text| FieldValue::Known(text.into()))
        }
        let keyword = |keyword: Option<&'static str>| {
            keyword.map_or(FieldValue::Unknown, |keyword| FieldValue::Known(keyword.into()))
        };
        let number = |number: Option<u32>| {
            number.map_or(FieldValue::Unknown, |number| FieldValue::Known(number.to_string().into()))
        };
        // These are parsed from the control group's path: if the path is known, a missing value is known to
        // be missing.
        fn in_cgroup<'a>(fields: &'a ConnectionFields, part: &'a Option<Arc<str>>) -> FieldValue<'a> {
            match text(part.as_deref()) {
                FieldValue::Unknown if fields.cgroup.is_some() => FieldValue::Absent,
                value => value,
            }
        }
        match self {
            Self::Addr => FieldValue::Known(fields.addr.as_str().into()),
            Self::Cause => keyword(fields.cause),
            Self::Cgroup => text(fields.cgroup.as_deref()),
            Self::Cmdline => match &fields.cmdline {
                Some(cmdline) => FieldValue::Known(cmdline.arguments().collect::<Vec<_>>().join(" ").into()),
                None => FieldValue::Unknown,
            },
            Self::Comm => text(fields.comm.as_deref()),
            Self::Container => in_cgroup(fields, &fields.container),
            Self::Exe => match text(fields.exe.as_deref()) {
                FieldValue::Known(path) if !fields.is_exe_ours => FieldValue::Claimed(path),
                value => value,
            },
            Self::Family => keyword(Some(fields.family)),
            Self::Ifindex => match number(fields.ifindex) {
                FieldValue::Unknown => FieldValue::Absent,
                value => value,
            },
            Self::KernelSocket => {
                keyword(fields.kernel_socket.map(|is_kernel| if is_kernel { "true" } else { "false" }))
            }
            Self::Netns => number(fields.netns),
            Self::Owner => keyword(fields.owner),
            Self::Pid => number(fields.pid),
            Self::Pod => in_cgroup(fields, &fields.pod),
            Self::Port => number(Some(fields.port.into())),
            Self::Source => keyword(Some(fields.source)),
            Self::ThreadComm => text(fields.thread_comm.as_deref()),
            Self::Uid => number(fields.uid),
            Self::Unit => in_cgroup(fields, &fields.unit),
        }
    }
}

impl Rule {
    /// True if the rule is about the arguments of a process.
    #[must_use]
    pub fn is_about_cmdline(&self) -> bool {
        self.key == FilterKey::Cmdline
    }

    /// True if the rule matches. `None`: the field is unknown.
    fn matches(&self, fields: &ConnectionFields) -> Option<bool> {
        match self.key.value(fields) {
            FieldValue::Known(text) => Some(self.glob.matches(&text)),
            FieldValue::Claimed(text) if self.glob.matches(&text) => None,
            FieldValue::Claimed(_) | FieldValue::Absent => Some(false),
            FieldValue::Unknown => None,
        }
    }

    /// The exclusion by this rule, of which [`Self::matches`] does not know whether it matches. `rules` is the text of
    /// the rules.
    fn unknown(&self, rules: &str, fields: &ConnectionFields) -> Exclusion {
        let name = self.key.name();
        let is_certain = !matches!(self.key.value(fields), FieldValue::Claimed(_))
            || !self.key.is_of_uncertain_process(fields);
        let why = if is_certain {
            format!("{rules}: {name} is unknown")
        } else {
            format!(
                "{rules}: {name} is not certain: the process has the socket open, and is not known to be of the \
                 socket's user"
            )
        };
        Exclusion { why, is_certain, is_by_except: false }
    }

    /// True if every process chooses the value of this field itself.
    fn is_chosen_by_process(&self) -> bool {
        matches!(self.key, FilterKey::Comm | FilterKey::ThreadComm | FilterKey::Cmdline)
    }

    /// The warning about this rule as an exception from what is destroyed, or nothing if not every process can claim it.
    #[must_use]
    pub fn warning_of_exception(&self) -> Option<&'static str> {
        self.is_chosen_by_process().then_some(
            "every process chooses this itself, so any program can exempt itself; uid, unit and port can't be forged",
        )
    }
}

/// Why a connection is not selected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exclusion {
    pub why: String,
    /// False: a rule asks for a field of the process that has the socket open, and that process need not be the one
    /// that the connection is of.
    pub is_certain: bool,
    /// True if a rule of `except` excludes the connection.
    pub is_by_except: bool,
}

/// A subset of all self-connections.
#[derive(Clone, Debug, Default)]
pub struct Selection {
    /// For every key that occurs here, at least one rule with that key must match.
    pub only: Vec<Rule>,
    /// None of these rules may match. A rule whose field is unknown counts as a match.
    pub except: Vec<Rule>,
}

impl Selection {
    /// True if a rule asks for the sockets that the kernel itself uses.
    #[must_use]
    pub fn asks_for_kernel_sockets(&self) -> bool {
        self.only.iter().any(|rule| rule.key == FilterKey::KernelSocket && rule.glob.matches("true"))
    }

    /// Why the connection may not be destroyed, though the rules select it. A socket of the kernel is destroyed only
    /// if a rule asks for it: mounts hang on it. A socket that is not known to have a file may be one of them.
    #[must_use]
    pub fn kernel_socket_reason(&self, fields: &ConnectionFields) -> Option<&'static str> {
        match fields.kernel_socket {
            Some(false) => None,
            Some(true) if self.asks_for_kernel_sockets() => None,
            Some(true) => {
                Some("the kernel itself uses the socket, and no rule only kernel_socket=true asks for it")
            }
            None => Some("no process is known to have the socket open: the kernel itself may use it"),
        }
    }

    /// Why the connection is not selected. `None`: it is selected. An unknown field counts against selection
    /// in both lists: it does not satisfy `only`, and it counts as a match of `except`. A certain reason comes before
    /// one that is not.
    #[must_use]
    pub fn exclusion(&self, fields: &ConnectionFields) -> Option<Exclusion> {
        let mut uncertain = None;
        let by_except = self.except.iter().filter_map(|rule| exclusion_by_except(rule, fields));
        let by_only = self.only.iter().filter_map(|rule| self.exclusion_by_only(rule, fields));
        for exclusion in by_except.chain(by_only) {
            if exclusion.is_certain {
                return Some(exclusion);
            }
            uncertain.get_or_insert(exclusion);
        }
        uncertain
    }

    /// Why the rules with the key of this one do not select the connection.
    fn exclusion_by_only(&self, rule: &Rule, fields: &ConnectionFields) -> Option<Exclusion> {
        let same_key = || self.only.iter().filter(|other| other.key == rule.key);
        if same_key().any(|rule| rule.matches(fields) == Some(true)) {
            return None;
        }
        let rules: Vec<_> = same_key().map(ToString::to_string).collect();
        let rules = format!("only {}", rules.join(" or "));
        Some(match same_key().find(|rule| rule.matches(fields).is_none()) {
            Some(rule) => rule.unknown(&rules, fields),
            None => Exclusion { why: rules, is_certain: true, is_by_except: false },
        })
    }
}

fn exclusion_by_except(rule: &Rule, fields: &ConnectionFields) -> Option<Exclusion> {
    match rule.matches(fields) {
        Some(true) => Some(Exclusion { why: format!("except {rule}"), is_certain: true, is_by_except: true }),
        Some(false) => None,
        None => Some(Exclusion { is_by_except: true, ..rule.unknown(&format!("except {rule}"), fields) }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn selection(only: &[&str], except: &[&str]) -> Selection {
        let rules = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
        Selection { only: rules(only), except: rules(except) }
    }

    #[test]
    fn except_wins_and_every_key_of_only_must_match() {
        for (only, except, is_selected) in [
            (&[][..], &[][..], true),
            (&["comm=java"], &[], true),
            (&["comm=j*"], &[], true),
            (&["comm=JAVA"], &[], false),
            (&["comm=ja"], &[], false),
            (&["comm=nginx", "comm=ja?a"], &[], true),
            (&["comm=java", "port=40000"], &[], true),
            (&["comm=java", "port=4*"], &[], true),
            (&["comm=java", "port=80"], &[], false),
            (&["comm=nginx", "port=40000"], &[], false),
            (&["exe=/usr/*"], &[], true),
            (&["cgroup=*docker*"], &[], true),
            (&["cmdline=*a.jar"], &[], true),
            (&["container=4a"], &[], true),
            (&["unit=*"], &[], false),
            (&["uid=1000", "netns=4026531833", "family=ipv4", "addr=127.*", "source=live"], &[], true),
            (&["pid=7", "owner=witnessed", "cause=ephemeral", "thread_comm=pool-[0-9]"], &[], true),
            (&["ifindex=*"], &[], false),
            (&["comm=java"], &["comm=java"], false),
            (&[], &["comm=nginx", "port=40000"], false),
            (&[], &["comm=nginx"], true),
            (&[], &["unit=*"], true),
        ] {
            let why =
                selection(only, except).exclusion(&ConnectionFields::sample()).map(|exclusion| exclusion.why);
            assert_eq!(why.is_none(), is_selected, "only {only:?} except {except:?}: {why:?}");
        }
    }

    #[test]
    fn unknown_fields_exclude_and_fields_known_to_be_empty_do_not() {
        let host =
            ConnectionFields { container: None, cgroup: Some("/".into()), ..ConnectionFields::sample() };
        let gone = ConnectionFields {
            container: None,
            cgroup: None,
            unit: None,
            exe: None,
            comm: None,
            ..ConnectionFields::sample()
        };
        for (fields, only, except, why) in [
            (&host, &[][..], &["container=*"][..], None),
            (&host, &["container=*"], &[], Some("only container=*")),
            (&gone, &[], &["container=*"], Some("except container=*: container is unknown")),
            (&gone, &[], &["unit=a"], Some("except unit=a: unit is unknown")),
            (&gone, &[], &["exe=/bin/a"], Some("except exe=/bin/a: exe is unknown")),
            (&gone, &["comm=*"], &[], Some("only comm=*: comm is unknown")),
            (&gone, &["comm=a", "comm=b"], &[], Some("only comm=a or comm=b: comm is unknown")),
            (&gone, &["port=40000"], &["port=1"], None),
        ] {
            assert_eq!(
                selection(only, except).exclusion(fields).map(|exclusion| exclusion.why).as_deref(),
                why,
                "{only:?} {except:?}"
            );
        }
    }

    #[test]
    fn an_exe_that_the_host_does_not_have_matches_no_rule_and_counts_as_unknown() {
        let forged = ConnectionFields { is_exe_ours: false, ..ConnectionFields::sample() };
        for (only, except, why) in [
            (&["exe=/usr/bin/java"][..], &[][..], Some("only exe=/usr/bin/java: exe is unknown")),
            (&["exe=/bin/*"], &[], Some("only exe=/bin/*")),
            (&[], &["exe=*java"], Some("except exe=*java: exe is unknown")),
            (&[], &["exe=/bin/sh"], None),
        ] {
            assert_eq!(
                selection(only, except).exclusion(&forged).map(|exclusion| exclusion.why).as_deref(),
                why,
                "{only:?} {except:?}"
            );
        }
    }

    #[test]
    fn what_is_known_of_a_process_of_another_user_than_the_sockets_selects_nothing_and_counts_as_unknown() {
        let held = ConnectionFields {
            owner: Some("holder"),
            source: "scan",
            thread_comm: None,
            unit: Some("dbus.service".into()),
            pod: Some("6f".into()),
            ..ConnectionFields::sample()
        };
        let given = ConnectionFields { is_process_certain: false, ..held.clone() };
        let matching = [
            "unit=dbus.service",
            "container=4a",
            "pod=6f",
            "cgroup=/docker/*",
            "exe=/usr/bin/java",
            "comm=java",
            "cmdline=java*",
            "pid=7",
        ];
        for rule in matching {
            let name = rule.split_once('=').unwrap().0;
            let reason = format!(
                "{rule}: {name} is not certain: the process has the socket open, and is not known to be of the \
                 socket's user"
            );
            assert_eq!(selection(&[rule], &[]).exclusion(&held).map(|exclusion| exclusion.why), None);
            assert_eq!(
                selection(&[], &[rule]).exclusion(&held).map(|exclusion| exclusion.why),
                Some(format!("except {rule}"))
            );
            assert_eq!(
                selection(&[rule], &[]).exclusion(&given).map(|exclusion| exclusion.why),
                Some(format!("only {reason}"))
            );
            assert_eq!(
                selection(&[], &[rule]).exclusion(&given).map(|exclusion| exclusion.why),
                Some(format!("except {reason}"))
            );
            for (fields, is_certain) in [(&held, true), (&given, false)] {
                assert_eq!(selection(&[], &[rule]).exclusion(fields).unwrap().is_certain, is_certain);
            }
        }
        // A certain reason comes first.
        for (only, except) in [(&["port=80"][..], &["exe=*"][..]), (&[], &["exe=*", "port=40000"])] {
            assert!(selection(only, except).exclusion(&given).unwrap().is_certain, "{only:?} {except:?}");
        }
        // What describes the socket is as certain as before, and so is what the process does not claim.
        for (only, except, why) in [
            (&["uid=1000", "port=40000", "owner=holder", "source=scan"][..], &["port=80"][..], None),
            (&["unit=other.service"], &[], Some("only unit=other.service")),
            (&[], &["unit=other.service"], None),
            (&[], &["thread_comm=a"], Some("except thread_comm=a: thread_comm is unknown")),
        ] {
            assert_eq!(
                selection(only, except).exclusion(&given).map(|exclusion| exclusion.why).as_deref(),
                why
            );
        }
    }

    #[test]
    fn a_socket_of_the_kernel_is_destroyed_only_if_a_rule_asks_for_it_and_an_unknown_one_never() {
        for (kernel_socket, only, is_spared) in [
            (Some(false), &[][..], false),
            (Some(true), &[], true),
            (Some(true), &["port=40000", "comm=*"], true),
            (Some(true), &["kernel_socket=false"], true),
            (Some(true), &["kernel_socket=true"], false),
            (None, &[], true),
            (None, &["kernel_socket=*"], true),
        ] {
            let fields = ConnectionFields { kernel_socket, ..ConnectionFields::sample() };
            let why = selection(only, &[]).kernel_socket_reason(&fields);
            assert_eq!(why.is_some(), is_spared, "{kernel_socket:?} {only:?}: {why:?}");
        }
    }

    #[test]
    fn names_and_arguments_are_chosen_by_the_process() {
        let chosen = KEYS
            .iter()
            .filter(|(name, _)| format!("{name}=*").parse::<Rule>().unwrap().is_chosen_by_process());
        assert_eq!(chosen.map(|(name, _)| *name).collect::<Vec<_>>(), ["cmdline", "comm", "thread_comm"]);
    }

    #[test]
    fn an_invalid_rule_is_an_error_that_lists_the_keys() {
        for (text, expected) in [
            ("java", "must be KEY=GLOB"),
            ("name=java", "unknown key name: must be one of addr, cause"),
            ("comm=[a", "invalid glob [a: "),
            ("=a", "unknown key : must be one of"),
        ] {
            let error = text.parse::<Rule>().unwrap_err();
            assert!(error.starts_with(expected), "{error}");
        }
        assert_eq!("exe=a=b".parse::<Rule>().unwrap().to_string(), "exe=a=b");
    }
}
