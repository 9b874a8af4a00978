//! The file of results: a part for each thing that is measured, which is replaced without touching the others.

use std::{fs, io, path::Path};

/// Puts a part in the place of the one that begins with the same line, or at the end.
pub(crate) fn write(path: &Path, part: &str) -> io::Result<()> {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        Err(error) => return Err(error),
    };
    fs::write(path, with(&text, part))
}

/// The text with the part in it.
fn with(text: &str, part: &str) -> String {
    let heading = |part: &str| part.lines().next().unwrap_or_default().to_owned();
    let mut parts: Vec<String> = Vec::new();
    for line in text.lines() {
        match parts.last_mut() {
            Some(last) if !line.starts_with("# ") && !line.starts_with("## ") => {
                last.push('\n');
                last.push_str(line);
            }
            _ => parts.push(line.to_owned()),
        }
    }
    match parts.iter_mut().find(|known| heading(known) == heading(part)) {
        Some(known) => part.clone_into(known),
        None => parts.push(part.to_owned()),
    }
    let parts: Vec<&str> = parts.iter().map(|part| part.trim_end()).collect();
    parts.join("\n\n") + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_is_put_in_its_place_and_the_others_stay() {
        let text = with("", "# All\n\none\n");
        let text = with(&text, "## Some\n\ntwo");
        let text = with(&text, "## More\n\nthree");
        assert_eq!(text, "# All\n\none\n\n## Some\n\ntwo\n\n## More\n\nthree\n");
        let text = with(&text, "# All\n\n1");
        let text = with(&text, "## Some\n\n2\n\n### of it");
        assert_eq!(text, "# All\n\n1\n\n## Some\n\n2\n\n### of it\n\n## More\n\nthree\n");
        assert_eq!(with(&text, "## More\n\nthree"), text);
    }
}
