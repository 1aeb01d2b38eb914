//! Parses the services that the user names on the command line or in a file. They may be down at the moment.

use std::{fs, net::IpAddr, ops::RangeInclusive, path::Path};

use anyhow::{Context as _, Result, anyhow};

/// Services that the user asks to audit: neighbouring ports of one address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct RequestedServices {
    /// `None`: any address of the host.
    pub(super) addr: Option<IpAddr>,
    pub(super) ports: RangeInclusive<u16>,
}

/// Parses a port, or a range such as `30000-32767`.
pub(super) fn parse_ports(text: &str) -> Result<RangeInclusive<u16>> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    match (first.parse(), last.parse()) {
        (Ok(first @ 1..), Ok(last)) if first <= last => Ok(first..=last),
        _ => Err(anyhow!("{text:?} is not a port number from 1 to 65535, or an ascending range of them")),
    }
}

pub(super) fn read(path: &Path) -> Result<Vec<RequestedServices>> {
    let file = path.display();
    let text = fs::read_to_string(path).with_context(|| format!("cannot read the services file {file}"))?;
    let line =
        |(number, line)| parse_line(line).with_context(|| format!("{file}, line {}", number + 1)).transpose();
    text.lines().enumerate().filter_map(line).collect()
}

/// Parses a line `port [addr]` or `first-last [addr]` with an optional `#` comment. `None`: the line has no
/// service.
fn parse_line(line: &str) -> Result<Option<RequestedServices>> {
    let line = line.split_once('#').map_or(line, |(line, _)| line);
    let mut words = line.split_whitespace();
    let (first, second, third) = (words.next(), words.next(), words.next());
    let Some(first) = first else { return Ok(None) };
    if let Some(third) = third {
        return Err(anyhow!("unexpected {third:?}: a line is `port [addr]`"));
    }
    let addr = |text: &str| match text.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>() {
        Ok(addr) if addr.is_unspecified() => Ok(None),
        Ok(addr) => Ok(Some(addr.to_canonical())),
        Err(_) => Err(anyhow!("{text:?} is not an IP address such as 127.0.0.1 or ::1")),
    };
    Ok(Some(RequestedServices { ports: parse_ports(first)?, addr: second.map(addr).transpose()?.flatten() }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_a_port_and_an_optional_address() {
        let rows = [
            ("8080", Some((8080..=8080, None))),
            ("  44446 127.0.0.1  # the broker", Some((44446..=44446, Some("127.0.0.1")))),
            ("44446\t::1", Some((44446..=44446, Some("::1")))),
            ("44446 [::1]", Some((44446..=44446, Some("::1")))),
            ("44446 ::ffff:10.0.0.1", Some((44446..=44446, Some("10.0.0.1")))),
            ("44446 0.0.0.0", Some((44446..=44446, None))),
            ("44446 ::", Some((44446..=44446, None))),
            ("30000-32767", Some((30000..=32767, None))),
            ("30000-30000 ::1 # one", Some((30000..=30000, Some("::1")))),
            ("# a comment", None),
            ("", None),
            ("  ", None),
        ];
        for (line, want) in rows {
            let want = want.map(|(ports, addr)| RequestedServices {
                ports,
                addr: addr.map(|addr| addr.parse().unwrap()),
            });
            assert_eq!(parse_line(line).unwrap(), want, "{line:?}");
        }
    }

    #[test]
    fn an_invalid_line_is_an_error_that_quotes_the_invalid_word() {
        for (line, expected) in [
            ("0", "\"0\" is not a port number"),
            ("65536", "\"65536\" is not a port number"),
            ("-1", "not a port number"),
            ("32767-30000", "\"32767-30000\" is not a port number from 1 to 65535, or an ascending range"),
            ("0-9", "\"0-9\" is not a port number"),
            ("1-2-3", "not a port number"),
            ("1-65536", "not a port number"),
            ("1 - 9", "unexpected \"9\""),
            ("http", "\"http\" is not a port number"),
            ("127.0.0.1 80", "\"127.0.0.1\" is not a port number"),
            ("80 localhost", "\"localhost\" is not an IP address"),
            ("80 127.0.0.1 tcp", "unexpected \"tcp\""),
        ] {
            let error = parse_line(line).unwrap_err().to_string();
            assert!(error.contains(expected), "{line:?}: {error}");
        }
    }

    #[test]
    fn an_error_names_the_file_and_the_line() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("services");
        fs::write(&path, "8080\n\n# x\n9000 here\n").unwrap();
        let error = format!("{:#}", read(&path).unwrap_err());
        assert!(
            error.ends_with("services, line 4: \"here\" is not an IP address such as 127.0.0.1 or ::1"),
            "{error}"
        );
        fs::write(&path, "8080\n\n# x\n9000 ::1\n").unwrap();
        assert_eq!(read(&path).unwrap().len(), 2);
    }
}
