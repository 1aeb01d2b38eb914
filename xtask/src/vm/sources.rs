//! Where this machine's packages come from, read from apt's own sources in both of their forms, and the list of
//! sources for the suites whose kernels we want from there. Pure: the caller reads and writes the files.

use std::fmt::Write as _;

/// The suites with the kernels we want.
const SUITES: [&str; 9] = [
    "bullseye",
    "bullseye-updates",
    "bookworm",
    "bookworm-updates",
    "bookworm-backports",
    "trixie",
    "trixie-updates",
    "trixie-backports",
    "sid",
];

/// Those of them that have an archive of security updates.
const SECURED: [&str; 3] = ["bullseye", "bookworm", "trixie"];

/// Names of suites by which Debian's own archive is known among a machine's sources.
const ALIASES: [&str; 5] = ["oldoldstable", "oldstable", "stable", "testing", "unstable"];

/// One source of packages.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Source {
    uris: Vec<String>,
    suites: Vec<String>,
    signed_by: Option<String>,
}

/// Reads the one-line form (`sources.list`): `deb [option=value …] uri suite component …`.
pub(super) fn parse_lines(text: &str) -> Vec<Source> {
    text.lines()
        .filter_map(|line| {
            let line = line.split('#').next()?.trim().strip_prefix("deb")?;
            let (options, rest) = match line.trim_start().strip_prefix('[') {
                Some(bracketed) => bracketed.split_once(']')?,
                // Without a blank this is `deb-src`.
                None => ("", line.strip_prefix(char::is_whitespace)?),
            };
            let mut words = rest.split_whitespace().map(str::to_owned);
            Some(Source {
                uris: vec![words.next()?],
                suites: vec![words.next()?],
                signed_by: options
                    .split_whitespace()
                    .find_map(|option| option.strip_prefix("signed-by="))
                    .map(str::to_owned),
            })
        })
        .collect()
}

/// Reads the deb822 form (`*.sources`): paragraphs of fields.
pub(super) fn parse_deb822(text: &str) -> Vec<Source> {
    let text: String =
        text.lines().filter(|line| !line.starts_with('#')).map(|line| format!("{line}\n")).collect();
    text.split("\n\n")
        .filter_map(|paragraph| {
            let field = |wanted: &str| {
                let mut lines = paragraph.lines().skip_while(|line| {
                    !line.split_once(':').is_some_and(|(name, _)| name.eq_ignore_ascii_case(wanted))
                });
                let mut value = lines.next()?.split_once(':')?.1.to_owned();
                for continued in lines.take_while(|line| line.starts_with([' ', '\t'])) {
                    value.push_str(continued);
                }
                Some(value)
            };
            let words = |wanted: &str| -> Vec<String> {
                field(wanted).unwrap_or_default().split_whitespace().map(str::to_owned).collect()
            };
            let disabled = words("Enabled").iter().any(|word| word == "no" || word == "false");
            (words("Types").iter().any(|word| word == "deb") && !disabled).then(|| Source {
                uris: words("URIs"),
                suites: words("Suites"),
                // A key written out in place of the path of a keyring is of no use to us.
                signed_by: words("Signed-By").into_iter().find(|word| word.starts_with('/')),
            })
        })
        .collect()
}

/// Debian's archive as this machine reaches it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Archive {
    main: String,
    security: Option<String>,
    signed_by: Option<String>,
}

impl Archive {
    /// Finds it among the machine's sources by the names of its suites.
    pub(super) fn find(sources: &[Source]) -> Option<Self> {
        let at = |part: Part| {
            sources.iter().find_map(|source| {
                let uri = source.uris.iter().find(|uri| !uri.starts_with("cdrom:"))?;
                source.suites.iter().find(|suite| Part::of(suite) == Some(part))?;
                Some((uri.clone(), source.signed_by.clone()))
            })
        };
        let (main, signed_by) = at(Part::Main)?;
        Some(Self { main, security: at(Part::Security).map(|(uri, _)| uri), signed_by })
    }

    /// The sources, in the one-line form, of the suites we want; `keyring` signs where the machine's own sources name
    /// none. Of each suite only the list of packages is wanted, whatever else the machine is configured to fetch.
    pub(super) fn list(&self, keyring: &str) -> String {
        let keyring = self.signed_by.as_deref().unwrap_or(keyring);
        let mut list = String::new();
        let main = SUITES.map(|suite| (&self.main, suite.to_owned()));
        let security =
            self.security.iter().flat_map(|uri| SECURED.map(|suite| (uri, format!("{suite}-security"))));
        for (uri, suite) in main.into_iter().chain(security) {
            // Writing to a string can't fail.
            let _ = writeln!(list, "deb [arch=amd64 target=Packages signed-by={keyring}] {uri} {suite} main");
        }
        list
    }
}

/// Debian's archive has two addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Main,
    Security,
}

impl Part {
    /// Where the suite lies; none where it isn't Debian's.
    fn of(suite: &str) -> Option<Self> {
        let known = |name: &str| SUITES.contains(&name) || ALIASES.contains(&name);
        if let Some(name) = suite.strip_suffix("-security").or_else(|| suite.strip_suffix("/updates")) {
            return known(name).then_some(Self::Security);
        }
        let name = suite.strip_suffix("-updates").or_else(|| suite.strip_suffix("-backports"));
        known(name.unwrap_or(suite)).then_some(Self::Main)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAIN: &str = "http://archive.example/debian";
    const SECURITY: &str = "http://archive.example/security";

    #[test]
    fn reads_the_one_line_form() {
        let text = "# deb http://no.example/x sid main\n\
                    deb [arch=amd64 signed-by=/keys/k.gpg] http://archive.example/debian trixie main contrib\n\
                    deb-src http://archive.example/debian trixie main\n\
                    deb http://archive.example/security trixie-security main # and why\n";
        let sources = parse_lines(text);
        assert_eq!(
            sources,
            [
                Source {
                    uris: vec![MAIN.into()],
                    suites: vec!["trixie".into()],
                    signed_by: Some("/keys/k.gpg".into())
                },
                Source {
                    uris: vec![SECURITY.into()],
                    suites: vec!["trixie-security".into()],
                    signed_by: None
                },
            ]
        );
    }

    #[test]
    fn reads_the_deb822_form() {
        let text = "Types: deb deb-src\n\
                    # URIs: http://no.example/x\n\
                    URIs: http://archive.example/debian\n\
                    suites: bookworm\n bookworm-updates\n\
                    Components: main\n\
                    Signed-By: /keys/k.gpg\n\
                    \n\
                    Types: deb-src\nURIs: http://no.example/x\nSuites: sid\n\
                    \n\
                    Enabled: no\nTypes: deb\nURIs: http://no.example/x\nSuites: sid\n\
                    \n\
                    Types: deb\nURIs: http://archive.example/security\nSuites: bookworm-security\n\
                    Signed-By:\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n mQ/x\n";
        let sources = parse_deb822(text);
        assert_eq!(
            sources,
            [
                Source {
                    uris: vec![MAIN.into()],
                    suites: vec!["bookworm".into(), "bookworm-updates".into()],
                    signed_by: Some("/keys/k.gpg".into())
                },
                Source {
                    uris: vec![SECURITY.into()],
                    suites: vec!["bookworm-security".into()],
                    signed_by: None
                },
            ]
        );
    }

    #[test]
    fn tells_debians_suites_from_others() {
        for (suite, expected) in [
            ("bookworm", Some(Part::Main)),
            ("bookworm-updates", Some(Part::Main)),
            ("stable-backports", Some(Part::Main)),
            ("sid", Some(Part::Main)),
            ("trixie-security", Some(Part::Security)),
            ("oldstable/updates", Some(Part::Security)),
            ("noble", None),
            ("noble-security", None),
            ("bookworm-pgdg", None),
            ("./", None),
        ] {
            assert_eq!(Part::of(suite), expected, "{suite}");
        }
    }

    #[test]
    fn finds_the_archive_among_others() {
        let source = |uri: &str, suite: &str| Source {
            uris: vec![uri.to_owned()],
            suites: vec![suite.to_owned()],
            signed_by: None,
        };
        let others =
            [source("http://other.example/node", "nodistro"), source("http://other.example/pg", "sid-pgdg")];
        assert_eq!(Archive::find(&others), None);
        let mut all = others.to_vec();
        all.extend([
            source("cdrom:[disc]/", "trixie"),
            source(MAIN, "trixie"),
            source(SECURITY, "trixie-security"),
        ]);
        let archive = Archive::find(&all).unwrap();
        assert_eq!(archive, Archive { main: MAIN.into(), security: Some(SECURITY.into()), signed_by: None });
        let list = archive.list("/keys/own.gpg");
        assert!(list.contains(
            "deb [arch=amd64 target=Packages signed-by=/keys/own.gpg] http://archive.example/debian sid main\n"
        ));
        assert!(list.contains("] http://archive.example/security bullseye-security main\n"));
        assert!(!list.contains("sid-security"));
    }
}
