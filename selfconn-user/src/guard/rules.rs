//! The rules of the guard: `--guard-except` and `--guard-only`. Pure. The program decides by port, user and control
//! group, because it has nothing else of a socket that the process can't choose itself.

use std::{collections::HashMap, fmt, ops::RangeInclusive, str::FromStr};

use glob::Pattern;
use selfconn_ebpf::guard::rule;

use crate::system::cgroup::NamedGroup;

/// Maximum number of rules.
pub const MAX_RULES: usize = 256;

/// A rule, such as `port=8000-8099` or `unit=java*`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuardRule {
    /// As the user wrote it.
    text: String,
    matched: MatchedBy,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum MatchedBy {
    Port(RangeInclusive<u16>),
    Uid(u32),
    Unit(Pattern),
    Cgroup(Pattern),
}

impl FromStr for GuardRule {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (key, value) = text.split_once('=').ok_or("must be KEY=VALUE")?;
        let glob = || Pattern::new(value).map_err(|error| format!("invalid glob {value}: {}", error.msg));
        let matched = match key {
            "port" => MatchedBy::Port(ports(value)?),
            "uid" => {
                MatchedBy::Uid(value.parse().map_err(|_| format!("uid {value} is not a number of a user"))?)
            }
            "unit" => MatchedBy::Unit(glob()?),
            "cgroup" => MatchedBy::Cgroup(glob()?),
            _ => return Err(format!("unknown key {key}: must be one of cgroup, port, uid, unit")),
        };
        Ok(Self { text: text.to_owned(), matched })
    }
}

impl fmt::Display for GuardRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// A port, or a range such as `30000-32767`.
fn ports(text: &str) -> Result<RangeInclusive<u16>, String> {
    let port = |text: &str| match text.parse::<u32>() {
        Ok(number @ 1..=65_535) => Ok(number as u16),
        _ => Err(format!("port {text} is not a number from 1 to 65535")),
    };
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let (first, last) = (port(first)?, port(last)?);
    if first > last { Err(format!("the range {text} is empty")) } else { Ok(first..=last) }
}

/// The rules of a run.
#[derive(Clone, Debug, Default)]
pub struct GuardRules {
    /// For every key that occurs here, at least one rule with that key must match.
    only: Vec<GuardRule>,
    /// None of these rules may match.
    except: Vec<GuardRule>,
    /// The id of a control group in which a socket must be, too.
    group: Option<u64>,
}

impl GuardRules {
    /// # Errors
    /// If there are too many rules.
    pub fn new(only: Vec<GuardRule>, except: Vec<GuardRule>) -> Result<Self, String> {
        match only.len() + except.len() {
            0..=MAX_RULES => Ok(Self { only, except, group: None }),
            count => Err(format!("{count} rules are too many: at most {MAX_RULES} can be given")),
        }
    }

    /// The same, for sockets of this control group only.
    #[must_use]
    pub fn in_group(self, group: Option<u64>) -> Self {
        Self { group, ..self }
    }

    /// Each rule with its bit of [`rule`].
    fn rules(&self) -> impl Iterator<Item = (&MatchedBy, u32)> {
        let only = self.only.iter().map(|rule| {
            let bit = match rule.matched {
                MatchedBy::Port(_) => rule::ONLY_PORT,
                MatchedBy::Uid(_) => rule::ONLY_UID,
                MatchedBy::Unit(_) => rule::ONLY_UNIT,
                MatchedBy::Cgroup(_) => rule::ONLY_CGROUP,
            };
            (&rule.matched, bit)
        });
        only.chain(self.except.iter().map(|except| (&except.matched, rule::EXCEPT)))
    }

    /// The kinds of rules of which each must match.
    #[must_use]
    pub fn required(&self) -> u32 {
        let of_group = if self.group.is_some() { rule::ONLY_GROUP } else { 0 };
        self.rules().map(|(_, bit)| bit & !rule::EXCEPT).fold(of_group, |all, bit| all | bit)
    }

    /// True if there are rules about control groups.
    #[must_use]
    pub fn by_cgroup(&self) -> bool {
        self.group.is_some() || self.has_names()
    }

    /// True if there are rules about names of control groups.
    #[must_use]
    pub fn has_names(&self) -> bool {
        self.rules().any(|(matched, _)| matches!(matched, MatchedBy::Unit(_) | MatchedBy::Cgroup(_)))
    }

    /// The bits of each port that a rule matches.
    #[must_use]
    pub fn ports(&self) -> HashMap<u16, u32> {
        let mut ports = HashMap::new();
        for (matched, bit) in self.rules() {
            if let MatchedBy::Port(range) = matched {
                range.clone().for_each(|port| *ports.entry(port).or_insert(0) |= bit);
            }
        }
        ports
    }

    /// The bits of each user that a rule matches.
    #[must_use]
    pub fn uids(&self) -> HashMap<u32, u32> {
        let mut uids = HashMap::new();
        for (matched, bit) in self.rules() {
            if let MatchedBy::Uid(uid) = matched {
                *uids.entry(*uid).or_insert(0) |= bit;
            }
        }
        uids
    }

    /// The bits of a control group. 0: no rule matches. What is below a group that a rule matches belongs to it.
    #[must_use]
    pub fn of_group(&self, group: &NamedGroup) -> u32 {
        let mut bits = 0;
        for (matched, bit) in self.rules() {
            let is_match = match matched {
                MatchedBy::Unit(glob) => group.unit.as_deref().is_some_and(|unit| glob.matches(unit)),
                MatchedBy::Cgroup(glob) => glob.matches(&group.path),
                MatchedBy::Port(_) | MatchedBy::Uid(_) => false,
            };
            bits |= if is_match { bit } else { 0 };
        }
        bits
    }
}

/// The rules of the control groups that need an entry in the program's map: the program asks for each group above the
/// socket's, too, so a group whose rules match one above it needs none.
#[derive(Debug, Default)]
pub struct GroupRules {
    pub by_id: HashMap<u64, u32>,
    /// The paths of these groups.
    by_path: HashMap<String, u32>,
}

impl GroupRules {
    /// The rules without those about names.
    #[must_use]
    pub fn new(rules: &GuardRules) -> Self {
        Self { by_id: rules.group.map(|id| (id, rule::ONLY_GROUP)).into_iter().collect(), ..Self::default() }
    }

    /// Adds a group. Those above it must be added before it.
    pub fn add(&mut self, group: &NamedGroup, bits: u32) {
        let above = group.path.match_indices('/').map(|(end, _)| &group.path[..end]);
        let inherited = above.filter_map(|path| self.by_path.get(path)).fold(0, |all, bits| all | bits);
        if bits & !inherited != 0 {
            *self.by_id.entry(group.id).or_insert(0) |= bits;
            self.by_path.insert(group.path.clone(), bits);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(only: &[&str], except: &[&str]) -> GuardRules {
        let parse = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
        GuardRules::new(parse(only), parse(except)).unwrap()
    }

    #[test]
    fn an_invalid_rule_is_named() {
        for (text, expected) in [
            ("java", "must be KEY=VALUE"),
            ("comm=java", "unknown key comm: must be one of cgroup, port, uid, unit"),
            ("port=0", "port 0 is not a number from 1 to 65535"),
            ("port=65536", "port 65536 is not a number from 1 to 65535"),
            ("port=a", "port a is not a number from 1 to 65535"),
            ("port=9-8", "the range 9-8 is empty"),
            ("port=8-", "port  is not a number from 1 to 65535"),
            ("uid=root", "uid root is not a number of a user"),
            ("uid=-1", "uid -1 is not a number of a user"),
        ] {
            assert_eq!(text.parse::<GuardRule>().unwrap_err(), expected, "{text}");
        }
        assert!("unit=[a".parse::<GuardRule>().unwrap_err().starts_with("invalid glob [a: "));
        assert_eq!("unit=a=b".parse::<GuardRule>().unwrap().to_string(), "unit=a=b");
        let many = vec!["port=1".parse().unwrap(); MAX_RULES + 1];
        assert!(GuardRules::new(many, vec![]).unwrap_err().contains("257 rules are too many"));
    }

    #[test]
    fn rules_become_bits_of_ports_and_users() {
        let rules = rules(&["port=8000-8002", "uid=7"], &["port=8001", "uid=8"]);
        assert_eq!(rules.required(), rule::ONLY_PORT | rule::ONLY_UID);
        assert!(!rules.by_cgroup());
        let ports = rules.ports();
        assert_eq!(ports.len(), 3);
        assert_eq!(ports[&8_001], rule::ONLY_PORT | rule::EXCEPT);
        assert_eq!(rules.uids(), [(7, rule::ONLY_UID), (8, rule::EXCEPT)].into());
        assert_eq!(GuardRules::default().required(), 0);
    }

    #[test]
    fn a_group_is_matched_by_its_unit_or_its_path() {
        let rules = rules(&["unit=java*"], &["cgroup=/test.slice*"]);
        assert!(rules.by_cgroup());
        let group = |path: &str, unit: Option<&str>| NamedGroup {
            path: path.to_owned(),
            unit: unit.map(str::to_owned),
            id: 1,
        };
        for (path, unit, bits) in [
            ("/a.slice/java-1.service", Some("java-1.service"), rule::ONLY_UNIT),
            ("/a.slice/nginx.service", Some("nginx.service"), 0),
            ("/a.slice", None, 0),
            ("/test.slice", None, rule::EXCEPT),
            ("/test.slice/java.service", Some("java.service"), rule::EXCEPT | rule::ONLY_UNIT),
        ] {
            assert_eq!(rules.of_group(&group(path, unit)), bits, "{path}");
        }
    }

    #[test]
    fn a_group_needs_an_entry_only_for_what_those_above_it_do_not_have() {
        let mut groups = GroupRules::default();
        let (unit, except) = (rule::ONLY_UNIT, rule::EXCEPT);
        for (id, path, bits) in [
            (1, "/a.slice", 0),
            (2, "/a.slice/java.service", unit),
            (3, "/a.slice/java.service/worker", unit),
            (4, "/a.slice/java.service/worker/exempt", unit | except),
            (5, "/a.slice/java.service/worker/exempt/below", unit | except),
            (6, "/a.slice/java.service-2", unit),
        ] {
            groups.add(&NamedGroup { path: path.to_owned(), unit: None, id }, bits);
        }
        assert_eq!(groups.by_id, [(2, unit), (4, unit | except), (6, unit)].into());
    }
}
