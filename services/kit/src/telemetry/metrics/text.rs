//! The text format of Prometheus, version 0.0.4.

use std::fmt::Write as _;

use super::{Family, Kind, Snapshot, Value};

/// Writes all that was read. Families of which there is no number yet are announced all the same.
pub(super) fn encode(snapshot: &Snapshot) -> String {
    let mut text = String::with_capacity(64 * 1_024);
    for (family, points) in snapshot.families() {
        let kind = match family.kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        };
        let help = family.help.replace('\\', "\\\\").replace('\n', "\\n");
        // Writing to a String cannot fail, here and below.
        let _ = writeln!(text, "# HELP {0} {help}\n# TYPE {0} {kind}", family.name);
        for point in points {
            match &point.value {
                Value::Whole(value) => line(&mut text, family, "", &point.labels, None, value),
                Value::Real(value) => line(&mut text, family, "", &point.labels, None, value),
                Value::Spread(spread) => {
                    let mut so_far = 0;
                    for (bucket, count) in spread.counts.iter().enumerate() {
                        so_far += count;
                        let bound = spread.bounds.get(bucket).map_or_else(|| "+Inf".to_owned(), ToString::to_string);
                        line(&mut text, family, "_bucket", &point.labels, Some(&bound), &so_far);
                    }
                    line(&mut text, family, "_sum", &point.labels, None, &spread.sum);
                    line(&mut text, family, "_count", &point.labels, None, &so_far);
                }
            }
        }
    }
    text
}

fn line(
    text: &mut String,
    family: &Family,
    suffix: &str,
    labels: &[String],
    bound: Option<&str>,
    value: &dyn std::fmt::Display,
) {
    text.push_str(family.name);
    text.push_str(suffix);
    let own = family.labels.iter().copied().zip(labels.iter().map(String::as_str));
    let mut before = '{';
    for (name, value) in own.chain(bound.map(|bound| ("le", bound))) {
        text.push(before);
        before = ',';
        text.push_str(name);
        text.push_str("=\"");
        for letter in value.chars() {
            match letter {
                '\\' => text.push_str("\\\\"),
                '"' => text.push_str("\\\""),
                '\n' => text.push_str("\\n"),
                letter => text.push(letter),
            }
        }
        text.push('"');
    }
    if before == ',' {
        text.push('}');
    }
    let _ = writeln!(text, " {value}");
}
