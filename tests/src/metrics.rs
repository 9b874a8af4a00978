//! Metrics, as others read them: the text of `/metrics`, and the queries of dashboards and rules.

use std::{
    collections::{BTreeMap, BTreeSet},
    env,
    process::{Command, Stdio},
};

use crate::{api::Api, process::print_lines};

/// A number, with its labels.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// The name, with `_bucket`, `_sum` or `_count` where it is of a histogram.
    pub name: String,
    /// The labels.
    pub labels: BTreeMap<String, String>,
    /// The number.
    pub value: f64,
}

/// Numbers of one name.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Family {
    /// What the numbers do.
    pub kind: String,
    /// What they say.
    pub help: String,
    /// The numbers.
    pub samples: Vec<Sample>,
}

/// What a process tells of itself.
#[derive(Clone, Debug, Default)]
pub struct Metrics(pub BTreeMap<String, Family>);

impl Metrics {
    /// What a process says at `/metrics`.
    pub async fn of(operations: &Api) -> Self {
        let answer = operations.get("/metrics").await;
        assert_eq!(answer.status, 200);
        assert_eq!(answer.header("content-type"), Some("text/plain; version=0.0.4; charset=utf-8"));
        Self::parse(&answer.text())
    }

    /// Reads the text format, and fails on anything that is not in order.
    pub fn parse(text: &str) -> Self {
        let mut families: BTreeMap<String, Family> = BTreeMap::new();
        for line in text.lines() {
            if let Some((name, help)) = line.strip_prefix("# HELP ").and_then(|rest| rest.split_once(' ')) {
                let family = Family { help: help.to_owned(), ..Family::default() };
                assert!(families.insert(name.to_owned(), family).is_none(), "{name} is announced twice");
            } else if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' ')) {
                let family = families.get_mut(name).unwrap_or_else(|| panic!("{name} has no HELP"));
                assert!(["counter", "gauge", "histogram"].contains(&kind), "{name} is {kind}");
                kind.clone_into(&mut family.kind);
            } else {
                let sample = Sample::parse(line);
                let name = family_of(&sample.name, |name| families.contains_key(name));
                let family = families.get_mut(name).unwrap_or_else(|| panic!("{} was not announced", sample.name));
                assert!(!family.kind.is_empty(), "{name} has no TYPE");
                let known = |other: &&Sample| other.name == sample.name && other.labels == sample.labels;
                assert!(family.samples.iter().find(known).is_none(), "{line} is there twice");
                family.samples.push(sample);
            }
        }
        Self(families)
    }

    /// The sum of all numbers of a name that have these labels.
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let has = |sample: &&Sample| {
            let mut wanted = labels.iter();
            sample.name == name && wanted.all(|(label, value)| sample.labels.get(*label).is_some_and(|is| is == value))
        };
        let family = &self.0[family_of(name, |name| self.0.contains_key(name))];
        family.samples.iter().filter(has).map(|sample| sample.value).sum()
    }
}

impl Sample {
    fn parse(line: &str) -> Self {
        let end = line.find(['{', ' ']).unwrap_or_else(|| panic!("{line:?} is no sample"));
        let (name, mut rest) = line.split_at(end);
        let mut labels = BTreeMap::new();
        if let Some(inner) = rest.strip_prefix('{') {
            rest = inner;
            loop {
                let (label, quoted) = rest.split_once("=\"").unwrap_or_else(|| panic!("{line:?} has no label"));
                let mut value = String::new();
                let mut letters = quoted.char_indices();
                let end = loop {
                    match letters.next().unwrap_or_else(|| panic!("{line:?} does not end")) {
                        (at, '"') => break at,
                        (_, '\\') => value.push(match letters.next() {
                            Some((_, 'n')) => '\n',
                            Some((_, letter)) => letter,
                            None => panic!("{line:?} does not end"),
                        }),
                        (_, letter) => value.push(letter),
                    }
                };
                assert!(labels.insert(label.to_owned(), value).is_none(), "{line:?} has {label} twice");
                rest = &quoted[end + 1..];
                match rest.split_at_checked(1) {
                    Some((",", more)) => rest = more,
                    Some(("}", more)) => {
                        rest = more;
                        break;
                    }
                    _ => panic!("{line:?} is no sample"),
                }
            }
        }
        let value = rest.trim().parse().unwrap_or_else(|_| panic!("{line:?} has no number"));
        Self { name: name.to_owned(), labels, value }
    }
}

/// `promtool`, where there is one; without it this is said loudly, and fails where `CI=true`.
pub fn promtool() -> Option<Command> {
    let there = Command::new("promtool").arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    if there.is_err() {
        assert_ne!(env::var("CI").as_deref(), Ok("true"), "there is no promtool, and CI skips nothing");
        print_lines("SKIPPED", &[]);
        return None;
    }
    Some(Command::new("promtool"))
}

/// The family that a sample of that name belongs to.
pub fn family_of(name: &str, is_known: impl Fn(&str) -> bool) -> &str {
    let cut = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| name.strip_suffix(suffix));
    match cut {
        Some(family) if !is_known(name) && is_known(family) => family,
        _ => name,
    }
}

/// What a query names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Named {
    /// Metrics.
    pub metrics: BTreeSet<String>,
    /// Labels.
    pub labels: BTreeSet<String>,
}

const AGGREGATIONS: [&str; 8] = ["sum", "max", "min", "avg", "count", "topk", "bottomk", "quantile"];
const FUNCTIONS: [&str; 14] = [
    "rate",
    "irate",
    "increase",
    "delta",
    "changes",
    "histogram_quantile",
    "absent",
    "time",
    "vector",
    "clamp_min",
    "clamp_max",
    "max_over_time",
    "min_over_time",
    "label_values",
];
const GROUPINGS: [&str; 6] = ["by", "without", "on", "ignoring", "group_left", "group_right"];
const OPERATORS: [&str; 5] = ["and", "or", "unless", "bool", "offset"];

#[derive(Clone, Debug, PartialEq)]
enum Token<'a> {
    Word(&'a str),
    Sign(char),
    /// A string, a number, a duration or a variable of a dashboard: nothing of it is a name.
    Other,
}

/// What a query in PromQL names. A word that is neither a function nor a keyword nor in the place of a label is taken
/// for a metric, so none can be missed; a function that is not known here fails.
pub fn names_in(query: &str) -> Named {
    let tokens = tokens(query);
    let mut named = Named::default();
    let (mut braces, mut labels_until) = (false, None);
    let mut depth = 0;
    // Of `label_values(metric{…}, label)`, the last word is a label.
    let mut label_values = None;
    for (at, token) in tokens.iter().enumerate() {
        let next = tokens.get(at + 1);
        match token {
            Token::Sign('{') => braces = true,
            Token::Sign('}') => braces = false,
            Token::Sign('(') => depth += 1,
            Token::Sign(')') => {
                depth -= 1;
                if labels_until == Some(depth) {
                    labels_until = None;
                }
            }
            Token::Sign(',') if label_values == Some(depth) && !braces => labels_until = Some(depth - 1),
            Token::Sign(_) | Token::Other => {}
            Token::Word(word) if braces || labels_until.is_some() => {
                named.labels.insert((*word).to_owned());
            }
            Token::Word(word) if GROUPINGS.contains(word) => {
                // `group_left` may stand without labels.
                if next == Some(&Token::Sign('(')) {
                    labels_until = Some(depth);
                }
            }
            Token::Word(word) if OPERATORS.contains(word) => {}
            Token::Word(word) if AGGREGATIONS.contains(word) => {
                let grouped = matches!(next, Some(Token::Word("by" | "without")));
                assert!(grouped || next == Some(&Token::Sign('(')), "{word} stands alone in {query}");
            }
            Token::Word(word) if next == Some(&Token::Sign('(')) => {
                assert!(FUNCTIONS.contains(word), "{word} in {query} is no function that is known here");
                if *word == "label_values" {
                    label_values = Some(depth + 1);
                }
            }
            Token::Word(word) => {
                named.metrics.insert((*word).to_owned());
            }
        }
    }
    assert!(depth == 0 && !braces, "{query} is not whole");
    named
}

fn tokens(query: &str) -> Vec<Token<'_>> {
    let mut tokens = Vec::new();
    let mut rest = query;
    let is_part = |letter: char| letter.is_ascii_alphanumeric() || letter == '_' || letter == ':';
    while let Some(first) = rest.chars().next() {
        let length = |is: &dyn Fn(char) -> bool| rest.find(|letter| !is(letter)).unwrap_or(rest.len());
        let taken = match first {
            '"' | '\'' => {
                let mut letters = rest.char_indices().skip(1);
                loop {
                    match letters.next().unwrap_or_else(|| panic!("{query} has a string that does not end")) {
                        (_, '\\') => drop(letters.next()),
                        (at, letter) if letter == first => break at + 1,
                        _ => {}
                    }
                }
            }
            // A range is a duration, whether a number or a variable.
            '[' => rest.find(']').unwrap_or_else(|| panic!("{query} has a range that does not end")) + 1,
            '$' => {
                1 + rest[1..]
                    .find(|letter| !(is_part(letter) || letter == '{' || letter == '}'))
                    .unwrap_or(rest.len() - 1)
            }
            '0'..='9' | '.' => length(&|letter| is_part(letter) || letter == '.'),
            letter if is_part(letter) => {
                let length = length(&is_part);
                tokens.push(Token::Word(&rest[..length]));
                rest = &rest[length..];
                continue;
            }
            letter if letter.is_whitespace() => {
                rest = &rest[letter.len_utf8()..];
                continue;
            }
            letter => {
                tokens.push(Token::Sign(letter));
                rest = &rest[letter.len_utf8()..];
                continue;
            }
        };
        tokens.push(Token::Other);
        rest = &rest[taken..];
    }
    tokens
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(query: &str) -> (Vec<String>, Vec<String>) {
        let Named { metrics, labels } = names_in(query);
        (metrics.into_iter().collect(), labels.into_iter().collect())
    }

    #[test]
    fn a_query_names_its_metrics_and_its_labels() {
        let all = |query: &str, metrics: &[&str], labels: &[&str]| {
            let to_owned = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
            assert_eq!(named(query), (to_owned(metrics), to_owned(labels)), "{query}");
        };
        all("up", &["up"], &[]);
        all("sum by (job, le) (rate(a_bucket{b=\"c\", d=~\"$d\"}[5m])) > 0.5", &["a_bucket"], &["b", "d", "job", "le"]);
        all("a / on (b) group_left () c and d offset 5m", &["a", "c", "d"], &["b"]);
        all("a / on (b) group_left c", &["a", "c"], &["b"]);
        all("x:y:rate5m or 0 * z or vector(1e9)", &["x:y:rate5m", "z"], &[]);
        all("topk(5, sum(rate(a[$__rate_interval])) by (rpc))", &["a"], &["rpc"]);
        all("label_values(a{job=~\"$job\"}, service)", &["a"], &["job", "service"]);
        all("count(A{b=\"it's (not) {c}\"}) - time() < 14 * 86400", &["A"], &["b"]);
        all("avg(a) + histogram_quantile(0.99, b)", &["a", "b"], &[]);
    }

    #[test]
    #[should_panic(expected = "no function that is known")]
    fn a_function_that_is_not_known_is_not_passed_over() {
        names_in("predict_linear(a[1h], 3600)");
    }

    #[test]
    fn the_text_format_is_read_as_it_is_written() {
        let text = "# HELP a_total A.\n# TYPE a_total counter\na_total{b=\"c\\\"\\\\\\n\",d=\"\"} 3\na_total{b=\"e\",d=\"\"} 4\n\
                    # HELP h_seconds H.\n# TYPE h_seconds histogram\nh_seconds_bucket{le=\"+Inf\"} 2\nh_seconds_sum 0.5\n\
                    h_seconds_count 2\n";
        let metrics = Metrics::parse(text);
        assert!((metrics.sum("a_total", &[("d", "")]) - 7.0).abs() < f64::EPSILON);
        assert_eq!(metrics.0["a_total"].samples[0].labels["b"], "c\"\\\n");
        assert!((metrics.sum("h_seconds_count", &[]) - 2.0).abs() < f64::EPSILON);
    }
}
