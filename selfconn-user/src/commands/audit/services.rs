//! The ports that the user names: services that may be down just now.

use std::{fs, net::IpAddr, path::Path};

use anyhow::{Context as _, Result, anyhow};

/// Where a service is dialled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Asked {
    /// `None`: at any address of the host.
    pub(super) addr: Option<IpAddr>,
    pub(super) port: u16,
}

/// A port as the command line has it.
pub(super) fn port(text: &str) -> Result<u16> {
    match text.parse() {
        Ok(port @ 1..) => Ok(port),
        _ => Err(anyhow!("{text:?} is not a port: a number from 1 to 65535")),
    }
}

/// The services in a file.
pub(super) fn read(path: &Path) -> Result<Vec<Asked>> {
    let file = path.display();
    let text = fs::read_to_string(path).with_context(|| format!("cannot read the services file {file}"))?;
    let line =
        |(number, line)| parse(line).with_context(|| format!("{file}, line {}", number + 1)).transpose();
    text.lines().enumerate().filter_map(line).collect()
}

/// `port [addr]`, and a comment behind a `#`. `None`: nothing else is there.
fn parse(line: &str) -> Result<Option<Asked>> {
    let line = line.split_once('#').map_or(line, |(line, _)| line);
    let mut words = line.split_whitespace();
    let (first, second, third) = (words.next(), words.next(), words.next());
    let Some(first) = first else { return Ok(None) };
    if let Some(third) = third {
        return Err(anyhow!("{third:?} is too much: a line is a port, and an address or none"));
    }
    let addr = |text: &str| match text.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>() {
        Ok(addr) if addr.is_unspecified() => Ok(None),
        Ok(addr) => Ok(Some(addr.to_canonical())),
        Err(_) => Err(anyhow!("{text:?} is not an address: as in 127.0.0.1 or ::1")),
    };
    Ok(Some(Asked { port: port(first)?, addr: second.map(addr).transpose()?.flatten() }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_a_port_and_maybe_an_address() {
        let rows = [
            ("8080", Some((8080, None))),
            ("  44446 127.0.0.1  # the broker", Some((44446, Some("127.0.0.1")))),
            ("44446\t::1", Some((44446, Some("::1")))),
            ("44446 [::1]", Some((44446, Some("::1")))),
            ("44446 ::ffff:10.0.0.1", Some((44446, Some("10.0.0.1")))),
            ("44446 0.0.0.0", Some((44446, None))),
            ("44446 ::", Some((44446, None))),
            ("# a comment", None),
            ("", None),
            ("  ", None),
        ];
        for (line, want) in rows {
            let want = want.map(|(port, addr)| Asked { port, addr: addr.map(|addr| addr.parse().unwrap()) });
            assert_eq!(parse(line).unwrap(), want, "{line:?}");
        }
    }

    #[test]
    fn what_is_no_service_is_an_error_that_quotes_it() {
        for (line, says) in [
            ("0", "\"0\" is not a port"),
            ("65536", "\"65536\" is not a port"),
            ("-1", "not a port"),
            ("http", "\"http\" is not a port"),
            ("127.0.0.1 80", "\"127.0.0.1\" is not a port"),
            ("80 localhost", "\"localhost\" is not an address"),
            ("80 127.0.0.1 tcp", "\"tcp\" is too much"),
        ] {
            let error = parse(line).unwrap_err().to_string();
            assert!(error.contains(says), "{line:?}: {error}");
        }
    }

    #[test]
    fn an_error_names_file_and_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("services");
        fs::write(&path, "8080\n\n# x\n9000 here\n").unwrap();
        let error = format!("{:#}", read(&path).unwrap_err());
        assert!(
            error.ends_with("services, line 4: \"here\" is not an address: as in 127.0.0.1 or ::1"),
            "{error}"
        );
        fs::write(&path, "8080\n\n# x\n9000 ::1\n").unwrap();
        assert_eq!(read(&path).unwrap().len(), 2);
    }
}
