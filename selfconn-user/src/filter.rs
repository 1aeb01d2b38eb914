//! Which self-connections are meant: `KEY=GLOB` over the fields of a connection. Pure.

use std::{borrow::Cow, fmt, str::FromStr};

use glob::Pattern;

use crate::event::Subject;

/// A rule, such as `comm=java*`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    key: Key,
    glob: Pattern,
}

/// What a rule looks at, by its name in events.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Key {
    Addr,
    Cause,
    Cgroup,
    Cmdline,
    Comm,
    Container,
    Exe,
    Family,
    Ifindex,
    Netns,
    Owner,
    Pid,
    Port,
    Source,
    ThreadComm,
    Uid,
    Unit,
}

const KEYS: [(&str, Key); 17] = [
    ("addr", Key::Addr),
    ("cause", Key::Cause),
    ("cgroup", Key::Cgroup),
    ("cmdline", Key::Cmdline),
    ("comm", Key::Comm),
    ("container", Key::Container),
    ("exe", Key::Exe),
    ("family", Key::Family),
    ("ifindex", Key::Ifindex),
    ("netns", Key::Netns),
    ("owner", Key::Owner),
    ("pid", Key::Pid),
    ("port", Key::Port),
    ("source", Key::Source),
    ("thread_comm", Key::ThreadComm),
    ("uid", Key::Uid),
    ("unit", Key::Unit),
];

impl FromStr for Rule {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, glob) = text.split_once('=').ok_or("not KEY=GLOB")?;
        let key = KEYS.iter().find(|(known, _)| *known == name).ok_or_else(|| {
            let known: Vec<_> = KEYS.iter().map(|(name, _)| *name).collect();
            format!("no key {name}: it is one of {}", known.join(", "))
        })?;
        let glob = Pattern::new(glob).map_err(|error| format!("the glob {glob}: {}", error.msg))?;
        Ok(Self { key: key.1, glob })
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.key.name(), self.glob)
    }
}

/// What is known of a field.
enum Value<'a> {
    Is(Cow<'a, str>),
    /// It has none, and that is known.
    Nothing,
    Unknown,
}

impl Key {
    fn name(self) -> &'static str {
        KEYS.iter().find(|(_, key)| *key == self).map_or("", |(name, _)| name)
    }

    fn value(self, subject: &Subject) -> Value<'_> {
        let text = |text: &Option<String>| text.clone().map_or(Value::Unknown, |text| Value::Is(text.into()));
        let word = |word: Option<&'static str>| word.map_or(Value::Unknown, |word| Value::Is(word.into()));
        let number = |number: Option<u32>| {
            number.map_or(Value::Unknown, |number| Value::Is(number.to_string().into()))
        };
        // These are read from the control group's path: where that is known, so is that there is none.
        let in_cgroup = |part: &Option<String>| match text(part) {
            Value::Unknown if subject.cgroup.is_some() => Value::Nothing,
            value => value,
        };
        match self {
            Self::Addr => Value::Is(subject.addr.as_str().into()),
            Self::Cause => word(subject.cause),
            Self::Cgroup => text(&subject.cgroup),
            Self::Cmdline => text(&subject.cmdline.as_ref().map(|arguments| arguments.join(" "))),
            Self::Comm => text(&subject.comm),
            Self::Container => in_cgroup(&subject.container),
            Self::Exe => text(&subject.exe),
            Self::Family => word(Some(subject.family)),
            Self::Ifindex => match number(subject.ifindex) {
                Value::Unknown => Value::Nothing,
                value => value,
            },
            Self::Netns => number(subject.netns),
            Self::Owner => word(subject.owner),
            Self::Pid => number(subject.pid),
            Self::Port => number(Some(subject.port.into())),
            Self::Source => word(Some(subject.source)),
            Self::ThreadComm => text(&subject.thread_comm),
            Self::Uid => number(subject.uid),
            Self::Unit => in_cgroup(&subject.unit),
        }
    }
}

impl Rule {
    /// `None`: the field is unknown.
    fn matches(&self, subject: &Subject) -> Option<bool> {
        match self.key.value(subject) {
            Value::Is(text) => Some(self.glob.matches(&text)),
            Value::Nothing => Some(false),
            Value::Unknown => None,
        }
    }
}

/// Some self-connections out of all.
#[derive(Clone, Debug, Default)]
pub struct Selection {
    /// For each key that is named here, one of its rules must match.
    pub only: Vec<Rule>,
    /// None of these may match, or could match if more was known.
    pub except: Vec<Rule>,
}

impl Selection {
    /// Why this one is not meant; `None`: it is. What is unknown speaks for leaving it alone, either way.
    #[must_use]
    pub fn spares(&self, subject: &Subject) -> Option<String> {
        for rule in &self.except {
            match rule.matches(subject) {
                Some(true) => return Some(format!("except {rule}")),
                Some(false) => {}
                None => return Some(format!("except {rule}: {} is unknown", rule.key.name())),
            }
        }
        for rule in &self.only {
            let alike = || self.only.iter().filter(|other| other.key == rule.key);
            if !alike().any(|rule| rule.matches(subject) == Some(true)) {
                let rules: Vec<_> = alike().map(ToString::to_string).collect();
                let unknown = if rule.matches(subject).is_none() {
                    format!(": {} is unknown", rule.key.name())
                } else {
                    String::new()
                };
                return Some(format!("only {}{unknown}", rules.join(" or ")));
            }
        }
        None
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// `java[7]` in a container, connected to itself.
    pub(crate) fn subject() -> Subject {
        Subject {
            id: "1-1".to_owned(),
            cookie: None,
            source: "live",
            family: "ipv4",
            addr: "127.0.0.1".to_owned(),
            ifindex: None,
            port: 40_000,
            netns: Some(4_026_531_833),
            cause: Some("ephemeral"),
            pid: Some(7),
            tid: Some(8),
            comm: Some("java".to_owned()),
            thread_comm: Some("pool-1".to_owned()),
            exe: Some("/usr/bin/java".to_owned()),
            cmdline: Some(vec!["java".to_owned(), "-jar".to_owned(), "a.jar".to_owned()]),
            uid: Some(1_000),
            cgroup: Some("/docker/4a".to_owned()),
            unit: None,
            container: Some("4a".to_owned()),
            owner: Some("witnessed"),
            holders: None,
            isn: None,
            peer_isn: None,
        }
    }

    fn selection(only: &[&str], except: &[&str]) -> Selection {
        let rules = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
        Selection { only: rules(only), except: rules(except) }
    }

    #[test]
    fn except_wins_and_each_key_of_only_must_match() {
        for (only, except, is_meant) in [
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
            let why = selection(only, except).spares(&subject());
            assert_eq!(why.is_none(), is_meant, "only {only:?} except {except:?}: {why:?}");
        }
    }

    #[test]
    fn the_unknown_is_spared_and_what_is_known_to_be_none_is_not() {
        let host = Subject { container: None, cgroup: Some("/".to_owned()), ..subject() };
        let gone = Subject { container: None, cgroup: None, unit: None, exe: None, comm: None, ..subject() };
        for (subject, only, except, why) in [
            (&host, &[][..], &["container=*"][..], None),
            (&host, &["container=*"], &[], Some("only container=*")),
            (&gone, &[], &["container=*"], Some("except container=*: container is unknown")),
            (&gone, &[], &["unit=a"], Some("except unit=a: unit is unknown")),
            (&gone, &[], &["exe=/bin/a"], Some("except exe=/bin/a: exe is unknown")),
            (&gone, &["comm=*"], &[], Some("only comm=*: comm is unknown")),
            (&gone, &["comm=a", "comm=b"], &[], Some("only comm=a or comm=b: comm is unknown")),
            (&gone, &["port=40000"], &["port=1"], None),
        ] {
            assert_eq!(selection(only, except).spares(subject).as_deref(), why, "{only:?} {except:?}");
        }
    }

    #[test]
    fn a_rule_that_can_not_be_meant_is_an_error_that_names_the_keys() {
        for (text, says) in [
            ("java", "not KEY=GLOB"),
            ("name=java", "no key name: it is one of addr, cause"),
            ("comm=[a", "the glob [a: "),
            ("=a", "no key : it is one of"),
        ] {
            let error = text.parse::<Rule>().unwrap_err();
            assert!(error.starts_with(says), "{error}");
        }
        assert_eq!("exe=a=b".parse::<Rule>().unwrap().to_string(), "exe=a=b");
    }
}
