//! Escapes text that a process chose, so that it cannot control a terminal.

/// Escapes control and format characters, and backslashes so that the result is unambiguous.
#[must_use]
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '"' | '\'' => out.push(c),
            _ => out.extend(c.escape_debug()),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_and_format_characters_are_escaped() {
        for (raw, safe) in [
            ("nginx", "nginx"),
            ("a b", "a b"),
            ("\n{\"event\":\"fake\"}", "\\n{\"event\":\"fake\"}"),
            ("\u{1b}[31mred", "\\u{1b}[31mred"),
            ("\u{202e}txt.exe", "\\u{202e}txt.exe"),
            ("\u{200b}", "\\u{200b}"),
            ("\u{feff}", "\\u{feff}"),
            ("\u{9b}31m", "\\u{9b}31m"),
            ("back\\slash", "back\\\\slash"),
            ("größe 大", "größe 大"),
        ] {
            assert_eq!(escape(raw), safe);
        }
    }
}
