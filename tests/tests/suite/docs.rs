//! The docs, held to what they say: every sample is run, every answer compared, every link followed.
//!
//! The blocks of a page tell by their first line what is done with them. `sh` blocks are run in the order of the page in
//! one shell, after those of the quickstart, against a real installation; `norun: why` leaves one out. What follows as
//! `json answer`, `json answer lines` or `http answer` has the members of what was answered; `json event` and `http event`
//! those of what has arrived at a receiver. `toml` is configuration that the binary takes, and `toml defaults` what it has
//! without one. `verify` marks programs that are given true deliveries and forged ones; `example` marks parts of the files
//! in `deploy/examples`.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use paperkey_proto::error::catalogue;
use paperkey_tests::{
    Api, Installation, Receiver,
    people::new_email,
    process::{self, Ended},
    receiver::Delivery,
    verifiers::Case,
};
use serde_json::{Value, json};
use tempfile::TempDir;

#[path = "../../verifiers/verify.rs"]
mod sample;

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

/// What the samples call the installation, and the people and servers around it.
const LOCAL: &str = "http://127.0.0.1:8080";
const SOMEBODY: &str = "you@example.com";
const SOMEBODYS_SERVER: &str = "https://you.example/hook";

/// Where people read the reference: it is tested where it is made.
const REFERENCE: &str = "/api/docs";

/// As many samples as may be left out. Each says why.
const MOST_NOT_RUN: usize = 8;

/// How long the samples of a page may take: some of them are commands that wait for the processes to follow. Less than
/// what ends the test (`.config/nextest.toml`), which would not say which sample it was.
const PATIENCE: Duration = Duration::from_mins(3);

/// A block of code on a page.
#[derive(Clone, Debug)]
struct Block {
    at: String,
    language: String,
    marks: Vec<String>,
    text: String,
}

impl Block {
    fn is(&self, language: &str, mark: &str) -> bool {
        self.language == language && self.marks.first().map_or("", String::as_str) == mark
    }
}

fn source(page: &str) -> String {
    let path = Path::new(ROOT).join(page);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The pages that are written by hand, the quickstart first.
fn pages() -> Vec<String> {
    let files = fs::read_dir(Path::new(ROOT).join("docs")).unwrap();
    let mut names: Vec<String> = files.map(|file| file.unwrap().file_name().into_string().unwrap()).collect();
    names.retain(|name| Path::new(name).extension().is_some_and(|end| end == "md"));
    names.sort_by_key(|name| (name != "quickstart.md", name.clone()));
    assert!(names.len() > 10, "{names:?}");
    names.into_iter().map(|name| format!("docs/{name}")).chain(["README.md".to_owned()]).collect()
}

fn blocks(page: &str) -> Vec<Block> {
    let source = source(page);
    let mut blocks = Vec::new();
    let mut lines = source.lines().enumerate();
    while let Some((number, line)) = lines.next() {
        let Some(info) = line.strip_prefix("```") else { continue };
        let mut words = info.split(' ').map(str::to_owned);
        let language = words.next().unwrap_or_default();
        let within: Vec<&str> = lines.by_ref().map(|(_, line)| line).take_while(|line| *line != "```").collect();
        let text = within.iter().fold(String::new(), |text, line| text + line + "\n");
        blocks.push(Block { at: format!("{page}:{}", number + 1), language, marks: words.collect(), text });
    }
    blocks
}

// --- samples of the shell, and what they are answered ----------------------------------------------------------------

/// Runs the samples of a page in one shell, and gives what each has written.
async fn run(install: &Installation, page: &str, receiver: &Receiver) -> BTreeMap<String, String> {
    let folder = TempDir::new().unwrap();
    let email = new_email();
    let told = |block: &Block| {
        let text = block.text.replace(LOCAL, &install.url());
        text.replace(SOMEBODY, &email).replace(SOMEBODYS_SERVER, receiver.url())
    };
    let runs = |block: &Block| block.language == "sh" && block.marks.first().is_none_or(|mark| mark != "norun:");
    let mut script = "set -eu\necho 'before the page' > at\n".to_owned();
    if page != "README.md" && page != "docs/quickstart.md" {
        for block in blocks("docs/quickstart.md").iter().filter(|block| runs(block)) {
            writeln!(script, "{{ {}\n}} > /dev/null", told(block)).unwrap();
        }
        // The events of the quickstart have arrived before a page looks at them.
        script.push_str(
            "waits=0\n\
             while [ \"$(curl -s $API/products/$PRODUCT/webhooks/$WEBHOOK/deliveries -H \"Authorization: Bearer $TOKEN\" \
             | grep -o '\"status\":\"succeeded\"' | wc -l)\" -lt 2 ]; do\n\
             waits=$((waits + 1))\n\
             [ $waits -lt 300 ] || { echo 'the events of the quickstart have not arrived' >&2; exit 1; }\n\
             sleep 0.1\ndone\n",
        );
    }
    let run: Vec<Block> = blocks(page).into_iter().filter(runs).collect();
    for (number, block) in run.iter().enumerate() {
        writeln!(script, "echo '{}' > at\n{{ {}\n}} > out-{number}", block.at, told(block)).unwrap();
    }
    let file = folder.path().join("samples");
    fs::write(&file, script).unwrap();
    let mut shell = install.shell(folder.path());
    shell.arg(&file);
    let at = || fs::read_to_string(folder.path().join("at")).unwrap_or_default().trim().to_owned();
    let ended = process::run_within(PATIENCE, page, shell, at).await;
    assert!(ended.status.success(), "{}: {}", at(), ended.err);
    let wrote = |number: usize| fs::read_to_string(folder.path().join(format!("out-{number}"))).unwrap();
    run.iter().enumerate().map(|(number, block)| (block.at.clone(), wrote(number))).collect()
}

/// Holds what is shown against what is so: the same members, and what is said about errors in the same words.
fn compare(shown: &Value, real: &Value, at: &str) {
    const TO_THE_LETTER: [&str; 6] = ["code", "type", "message", "valid", "success", "isActivated"];
    match (shown, real) {
        (Value::Object(shown), Value::Object(real)) => {
            let (of_shown, of_real): (BTreeSet<_>, BTreeSet<_>) = (shown.keys().collect(), real.keys().collect());
            assert_eq!(of_shown, of_real, "{at}: the members that are shown, and those that there are");
            for (name, value) in shown {
                if TO_THE_LETTER.contains(&name.as_str()) {
                    assert_eq!(value, &real[name], "{at}.{name}");
                }
                compare(value, &real[name], &format!("{at}.{name}"));
            }
        }
        (Value::Array(shown), Value::Array(real)) => {
            assert_eq!(shown.is_empty(), real.is_empty(), "{at}: {shown:?} and {real:?}");
            for (number, (shown, real)) in shown.iter().zip(real).enumerate() {
                compare(shown, real, &format!("{at}[{number}]"));
            }
        }
        // What is not there yet here may be there already there.
        (Value::Null, _) | (_, Value::Null) => {}
        (shown, real) => {
            assert_eq!(std::mem::discriminant(shown), std::mem::discriminant(real), "{at}: {shown} and {real}");
        }
    }
}

fn parsed(text: &str, at: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{at} is no JSON: {error}: {text}"))
}

/// Holds the headers that are shown against those of an answer, by their values too where these are the same each time:
/// ids, numbers and times are not.
fn compare_headers(shown: &str, real: &str, at: &str) {
    // Of the line of the status all is the name.
    let split = |line: &str| {
        let (name, value) = line.split_once(':').unwrap_or((line, ""));
        (name.trim().to_ascii_lowercase(), value.trim().to_owned())
    };
    let real: Vec<(String, String)> = real.lines().map(split).collect();
    for (name, value) in shown.lines().map(split) {
        let steady = !value.contains(|c: char| c == '…' || c.is_ascii_digit());
        let is_there = real.iter().any(|(real, with)| *real == name && (!steady || *with == value));
        assert!(is_there, "{at}: there is no {name}: {value} in {real:#?}");
    }
}

/// Runs a page, and compares all that it shows.
async fn holds(page: &str) {
    let install = Installation::all_in_one().await;
    let receiver = Receiver::start().await;
    let wrote = run(&install, page, &receiver).await;
    let mut last = None;
    let blocks = blocks(page);
    for (place, block) in blocks.iter().enumerate() {
        let at = &block.at;
        let answered = || last.unwrap_or_else(|| panic!("{at} answers nothing"));
        if let Some(wrote) = wrote.get(at) {
            let compared =
                blocks.get(place + 1).is_some_and(|next| next.marks.first().is_some_and(|mark| mark == "answer"));
            let asks = block.text.lines().any(|line| line.starts_with("curl") || line.starts_with("paperkey"));
            assert!(!asks || !wrote.trim().is_empty() || block.text.contains(" -o "), "{at} writes nothing");
            assert!(compared || !wrote.contains("\"error\":"), "{at} fails, and the page does not say so: {wrote}");
            last = Some(wrote.as_str());
        } else if block.is("json", "answer") && block.marks.len() == 1 {
            let line = answered().lines().rfind(|line| !line.trim().is_empty()).unwrap_or_default();
            compare(&parsed(&block.text, at), &parsed(line, at), at);
        } else if block.is("json", "answer") {
            let (shown, real) = (block.text.lines(), answered().lines());
            assert_eq!(shown.clone().count(), real.clone().count(), "{at}: {}", answered());
            for (shown, real) in shown.zip(real) {
                compare(&parsed(shown, at), &parsed(real, at), at);
            }
        } else if block.is("json", "event") {
            let shown = parsed(&block.text, at);
            let is_that = |delivery: &&Delivery| shown["event"] == delivery.event();
            let real =
                receiver.wait(&format!("{at}: {}", shown["event"]), |all| all.iter().find(is_that).cloned()).await;
            compare(&shown, &real.json, at);
        } else if block.is("http", "event") {
            let real = receiver.received(1).await.remove(0);
            let real = real.headers.iter().map(|(name, value)| format!("{name}: {}\n", value.to_str().unwrap()));
            compare_headers(&block.text, &real.collect::<String>(), at);
        } else if block.is("http", "answer") {
            compare_headers(&block.text, answered(), at);
        }
    }
}

macro_rules! pages_hold {
    ($($test:ident: $page:literal),+ $(,)?) => {
        mod samples_hold {
            $(
                #[tokio::test(flavor = "multi_thread")]
                async fn $test() {
                    super::holds($page).await;
                }
            )+
        }

        /// The pages whose samples are run.
        const RUN: &[&str] = &[$($page),+];
    };
}

pages_hold! {
    of_the_quickstart: "docs/quickstart.md",
    of_authentication: "docs/authentication.md",
    of_modes: "docs/modes.md",
    of_limits: "docs/limits.md",
    of_licenses: "docs/licenses.md",
    of_webhooks: "docs/webhooks.md",
    of_protect: "docs/protect.md",
    of_audit: "docs/audit.md",
    of_self_hosting: "docs/self-hosting.md",
    of_readme: "README.md",
}

#[test]
fn every_block_is_of_a_kind_that_is_held_to_something_and_few_are_not_run() {
    let mut not_run = Vec::new();
    for page in pages() {
        let blocks = blocks(&page);
        let samples = blocks.iter().any(|block| block.is("sh", ""));
        assert!(!samples || RUN.contains(&page.as_str()), "nobody runs the samples of {page}");
        for block in blocks {
            let marks: Vec<&str> = block.marks.iter().map(String::as_str).collect();
            match (block.language.as_str(), marks.as_slice()) {
                ("sh", ["norun:", why @ ..]) if !why.is_empty() => not_run.push(block.at),
                ("sh" | "toml", [])
                | ("toml", ["defaults"])
                | ("json" | "http", ["answer" | "event"])
                | ("json", ["answer", "lines"])
                | ("js" | "python" | "ruby" | "php" | "rust", ["verify"]) => {}
                ("nginx" | "caddyfile", ["example"]) => is_of_an_example(&block),
                _ => panic!("{}: nobody knows what to hold {} {marks:?} to", block.at, block.language),
            }
        }
    }
    assert!(not_run.len() <= MOST_NOT_RUN, "too many samples are not run: {not_run:?}");
}

fn is_of_an_example(block: &Block) {
    let file = if block.language == "nginx" { "deploy/examples/nginx.conf" } else { "deploy/examples/Caddyfile" };
    let squeezed = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    let lines: BTreeSet<String> = source(file).lines().map(squeezed).collect();
    for line in block.text.lines() {
        assert!(lines.contains(&squeezed(line)), "{}: {file} has no line {line}", block.at);
    }
}

// --- configuration ---------------------------------------------------------------------------------------------------

async fn config(arguments: &[&str], text: &str) -> Ended {
    let folder = TempDir::new().unwrap();
    fs::write(folder.path().join("paperkey.toml"), text).unwrap();
    let mut all = vec!["config"];
    all.extend(arguments);
    all.extend(["--config", "paperkey.toml"]);
    process::run(process::command(&all, &[], folder.path()), "").await
}

#[tokio::test(flavor = "multi_thread")]
async fn configuration_that_is_shown_is_taken() {
    let shown = pages().into_iter().flat_map(|page| blocks(&page)).filter(|block| block.language == "toml");
    for block in shown {
        let ended = config(&["check"], &block.text).await;
        assert!(ended.status.success(), "{}: {}", block.at, ended.err);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_defaults_are_shown_all_of_them_and_as_they_are() {
    let shown: String = blocks("docs/self-hosting.md")
        .iter()
        .filter(|block| block.is("toml", "defaults"))
        .map(|block| block.text.clone())
        .collect();
    let without = config(&["print"], "").await.succeeded().to_owned();
    assert_eq!(config(&["print"], &shown).await.succeeded(), without, "the defaults as shown, and as they are");
    for line in without.lines().filter(|line| line.contains(" = ") && *line != "upstreams = []") {
        let name = line.split_once(" = ").unwrap().0;
        let is_there =
            |line: &str| line.starts_with(&format!("{name} = ")) || line.starts_with(&format!("quota.{name} = "));
        assert!(shown.lines().any(is_there), "{name} is not shown");
    }
    for section in without.lines().filter(|line| line.starts_with('[') && !line.ends_with(".quota]")) {
        assert!(shown.lines().any(|line| line.starts_with(section)), "{section} is not shown");
    }
    // Those that are absent by default have names that are known.
    let with_all = shown.replace("\n# ", "\n");
    let said = config(&["check"], &with_all).await.err;
    assert!(!said.contains("unknown") && !said.contains("not TOML"), "{said}");
}

// --- programs that verify --------------------------------------------------------------------------------------------

/// A language: what runs its programs, how their files end, and what makes the sample a program that reads cases and
/// writes verdicts.
const LANGUAGES: [(&str, &str, &str, &str); 4] = [
    (
        "js",
        "node",
        "mjs",
        "import { text } from 'node:stream/consumers';\n\
         const cases = JSON.parse(await text(process.stdin));\n\
         console.log(JSON.stringify(cases.map((one) => verify(Buffer.from(one.body), one.headers, one.secret))));\n",
    ),
    (
        "python",
        "python3",
        "py",
        "\n\nimport json\nimport sys\n\n\
         cases = json.loads(sys.stdin.buffer.read())\n\
         print(json.dumps([verify(one['body'].encode(), one['headers'], one['secret']) for one in cases]))\n",
    ),
    (
        "ruby",
        "ruby",
        "rb",
        "require 'json'\n\
         cases = JSON.parse($stdin.read.force_encoding('UTF-8'))\n\
         puts JSON.generate(cases.map { |one| verify(one['body'], one['headers'], one['secret']) })\n",
    ),
    (
        "php",
        "php",
        "php",
        "$cases = json_decode(file_get_contents('php://stdin'), true);\n\
         echo json_encode(array_map(fn ($one) => verify($one['body'], $one['headers'], $one['secret']), $cases));\n",
    ),
];

/// What the program of a language says to each case; nothing where the language is not there.
async fn judged_by(language: &str, program: &str, cases: &[Case]) -> Option<Vec<bool>> {
    if language == "rust" {
        return Some(cases.iter().map(judged_by_rust).collect());
    }
    let (_, runner, end, driver) = LANGUAGES.iter().find(|(name, ..)| *name == language).unwrap();
    let is_there = Command::new(runner).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok();
    if !is_there {
        assert_ne!(std::env::var("CI").as_deref(), Ok("true"), "there is no {runner}, and CI skips nothing");
        return None;
    }
    let folder = TempDir::new().unwrap();
    let file = folder.path().join(format!("program.{end}"));
    fs::write(&file, format!("{program}{driver}")).unwrap();
    let mut command = Command::new(runner);
    command.arg(&file).stdout(Stdio::piped()).stderr(Stdio::piped());
    let asked = cases.iter().map(|case| json!({"headers": case.headers, "body": case.body, "secret": case.secret}));
    let ended = process::run(command, &asked.collect::<Value>().to_string()).await;
    Some(serde_json::from_str(ended.succeeded()).unwrap_or_else(|error| panic!("{language}: {error}: {ended:?}")))
}

fn judged_by_rust(case: &Case) -> bool {
    let header = |(name, value): (&&'static str, &String)| {
        (HeaderName::from_static(name), HeaderValue::from_str(value).unwrap())
    };
    sample::verify(case.body.as_bytes(), &case.headers.iter().map(header).collect::<HeaderMap>(), &case.secret)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_programs_of_five_languages_take_what_was_sent_and_nothing_else() {
    let install = Installation::all_in_one().await;
    let receiver = Receiver::start().await;
    let owner = install.register().await;
    let product = owner.create_product("App").await;
    let webhook = owner.subscribe(&product, receiver.url()).await;
    owner.issue(&product, json!({"metadata": {"name": "Grüße 東京 🗝 \"quoted\" \\"}})).await;
    let good = Case::of(&receiver.received(1).await[0], &webhook.secret);
    let path = format!("/products/{}/webhooks/{}/rotate-secret", product.id, webhook.id);
    let new = owner.post(&path, json!({})).await.gives(200)["secret"].as_str().unwrap().to_owned();
    owner.issue(&product, json!({})).await;
    let rotated = receiver.received(2).await.remove(1);
    let taken = [good.clone(), Case::of(&rotated, &webhook.secret), Case::of(&rotated, &new)];

    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let signer = standardwebhooks::Webhook::new(&webhook.secret).unwrap();
    let signed_at = |seconds: u64| {
        let then = seconds.try_into().unwrap();
        let signature = signer.sign(&good.headers["webhook-id"], then, good.body.as_bytes()).unwrap();
        good.with("webhook-timestamp", &seconds.to_string()).with("webhook-signature", &signature)
    };
    let without = |name: &'static str| {
        let mut case = good.clone();
        case.headers.remove(name);
        case
    };
    let refused = [
        Case { body: good.body.replace("license", "licence"), ..good.clone() },
        Case { body: format!("{} ", good.body), ..good.clone() },
        Case { body: String::new(), ..good.clone() },
        Case { secret: new.clone(), ..good.clone() },
        // Rightly signed, and brought again by somebody who has kept it, or with a clock that is wrong.
        signed_at(now - 330),
        signed_at(now + 330),
        good.with("webhook-timestamp", "soon"),
        good.with("webhook-timestamp", ""),
        good.with("webhook-id", rotated.header("webhook-id")),
        good.with("webhook-signature", ""),
        good.with("webhook-signature", "v1,"),
        good.with("webhook-signature", good.headers["webhook-signature"].trim_start_matches("v1,")),
        without("webhook-signature"),
        without("webhook-timestamp"),
        without("webhook-id"),
    ];
    let cases: Vec<Case> = taken.iter().chain(&refused).cloned().collect();
    let expected: Vec<bool> = cases.iter().enumerate().map(|(place, _)| place < taken.len()).collect();
    let programs: Vec<Block> =
        blocks("docs/webhooks.md").into_iter().filter(|block| block.marks == ["verify"]).collect();
    let languages: BTreeSet<&str> = programs.iter().map(|block| block.language.as_str()).collect();
    assert_eq!(languages, BTreeSet::from(["js", "php", "python", "ruby", "rust"]));
    for program in &programs {
        if let Some(verdicts) = judged_by(&program.language, &program.text, &cases).await {
            assert_eq!(verdicts, expected, "{}", program.language);
        }
    }
    let of_rust = programs.iter().find(|program| program.language == "rust").unwrap();
    assert_eq!(of_rust.text, include_str!("../../verifiers/verify.rs"), "the sample, and what was tested");
}

// --- links -----------------------------------------------------------------------------------------------------------

/// The links of a page, as they are written.
fn links(text: &str, is_html: bool) -> BTreeSet<String> {
    let (open, close) = if is_html { (" href=\"", '"') } else { ("](", ')') };
    let mut links: BTreeSet<String> =
        text.split(open).skip(1).filter_map(|rest| Some(rest.split_once(close)?.0.to_owned())).collect();
    links.retain(|link| !link.is_empty());
    links
}

/// The anchors of a page in Markdown.
fn anchors(source: &str) -> BTreeSet<String> {
    let mut fenced = false;
    let mut anchors = BTreeSet::new();
    for line in source.lines() {
        fenced ^= line.starts_with("```");
        let Some(heading) = line.strip_prefix('#').filter(|_| !fenced) else { continue };
        let text = heading.trim_start_matches('#').trim().to_lowercase();
        let kept: String = text.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c)).collect();
        anchors.insert(kept.replace(' ', "-"));
    }
    anchors
}

/// Where a link leads from a page: a path, and an anchor.
fn led(from: &str, link: &str) -> (String, String) {
    let (path, anchor) = link.split_once('#').unwrap_or((link, ""));
    let path = match path {
        "" => from.to_owned(),
        path if path.starts_with('/') => path.to_owned(),
        path => format!("{}/{path}", from.rsplit_once('/').unwrap().0),
    };
    (path, anchor.to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn every_link_leads_somewhere() {
    let install = Installation::all_in_one().await;
    let (url, api) = (install.url(), Api::of_another(&install.url()));
    let mut waiting: VecDeque<String> = ["/docs/", "/docs.md", "/llms.txt"].map(str::to_owned).into();
    let mut seen: BTreeMap<String, String> = BTreeMap::new();
    let mut wanted: Vec<(String, String, String)> = Vec::new();
    while let Some(path) = waiting.pop_front() {
        if seen.contains_key(&path) || path == REFERENCE {
            continue;
        }
        let answer = api.get(&path).await;
        assert_eq!(answer.status, StatusCode::OK, "{path}, to which somebody links: {wanted:?}");
        let kind = answer.headers[http::header::CONTENT_TYPE].to_str().unwrap().to_owned();
        let text = String::from_utf8_lossy(&answer.body).into_owned();
        let is_html = kind.starts_with("text/html");
        let is_ours = path.starts_with("/docs") || path.starts_with("/pricing") || path == "/llms.txt";
        if is_ours && (is_html || kind.starts_with("text/markdown") || path == "/llms.txt") {
            assert!(!text.contains(LOCAL) || url == LOCAL, "{path} speaks of {LOCAL}");
            for link in links(&text, is_html) {
                let own = link.strip_prefix(&url).unwrap_or(&link);
                if own.starts_with("http") {
                    assert!(own.starts_with("https://www.standardwebhooks.com"), "{path} leads out, to {own}");
                    continue;
                }
                let (to, anchor) = led(&path, if own.is_empty() { "/docs/" } else { own });
                wanted.push((path.clone(), to.clone(), anchor));
                waiting.push_back(to);
            }
        }
        seen.insert(path, text);
    }
    for (from, to, anchor) in wanted.iter().filter(|(.., anchor)| !anchor.is_empty()) {
        let text = &seen[to];
        let is_there = if Path::new(to).extension().is_some_and(|end| end == "md") {
            anchors(text).contains(anchor)
        } else {
            text.contains(&format!(" id=\"{anchor}\""))
        };
        assert!(is_there, "{from} leads to {to}#{anchor}, which is not there");
    }
    for page in pages().iter().filter_map(|page| page.strip_prefix("docs/")?.strip_suffix(".md")) {
        assert!(seen.contains_key(&format!("/docs/{page}.md")), "no page leads to {page}.md");
        let html = if page == "errors" { "/docs/errors/".to_owned() } else { format!("/docs/{page}") };
        let text = seen.get(&html).unwrap_or_else(|| panic!("no page leads to {html}"));
        for part in ["/docs/", REFERENCE, "/pricing", "/app/"] {
            assert!(text.contains(&format!("<a href=\"{part}\"")), "{html} does not lead to {part}");
        }
        assert!(!text.contains("<script"), "{html} runs scripts");
    }
    assert!(seen.contains_key("/docs/examples/nginx.conf") && seen.contains_key("/docs/errors/PB_NOT_FOUND.md"));
    assert_eq!(api.get("/docs/no-such-page").await.status, StatusCode::NOT_FOUND);
    assert_eq!(api.get("/docs/no-such-page.md").await.status, StatusCode::NOT_FOUND);
    assert!(api.get("/docs/quickstart/").await.status.is_redirection());
}

#[test]
fn every_link_between_the_files_leads_somewhere_too() {
    for page in pages().into_iter().chain(["ARCHITECTURE.md".to_owned(), "CONTRIBUTING.md".to_owned()]) {
        let text = source(&page);
        let folder = Path::new(ROOT).join(&page).parent().map(PathBuf::from).unwrap();
        for link in links(&text, false).into_iter().filter(|link| !link.contains(':')) {
            let (file, anchor) = link.split_once('#').unwrap_or((&link, ""));
            let file = if file.is_empty() { Path::new(ROOT).join(&page) } else { folder.join(file) };
            assert!(file.exists(), "{page} leads to {link}, which is not there");
            if !anchor.is_empty() {
                let there = anchors(&fs::read_to_string(&file).unwrap());
                assert!(there.contains(anchor), "{page} leads to {link}, where there is only {there:?}");
            }
        }
    }
}

#[test]
fn every_error_that_the_docs_name_is_one() {
    let known: BTreeSet<&str> = catalogue().map(|(_, entry)| entry.agent_code.as_str()).collect();
    for page in pages() {
        let text = source(&page);
        let words = text.split(|c: char| !c.is_ascii_uppercase() && c != '_').filter(|word| word.starts_with("PB_"));
        for word in words.filter(|word| word.len() > 3) {
            assert!(known.contains(word), "{page} names {word}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_page_of_plans_shows_the_numbers_that_the_headers_show() {
    let settings = paperkey_tests::Settings {
        environment: vec![
            (
                "PAPERKEY__LIMITS",
                "{ per_ip = { requests = 123457 }, license_validate = { requests = 4321, window_s = 90 } }".to_owned(),
            ),
            ("PAPERKEY__TIERS", "{ free = { requests_per_minute = 234567, quota = { renders = 345678 } } }".to_owned()),
            ("PAPERKEY__BILLING__URL", "https://example.com/plans".to_owned()),
        ],
        ..Default::default()
    };
    let install = Installation::all_in_one_with(settings).await;
    let owner = install.register().await;
    let pricing = Api::of_another(&install.url()).get("/pricing.md").await;
    let text = String::from_utf8_lossy(&pricing.body).into_owned();
    for part in ["234,567", "renders: 345,678", "123,457 a minute", "4,321 in 90 seconds", "https://example.com/plans"]
    {
        assert!(text.contains(part), "{part} is not in {text}");
    }
    let told = owner.integration().get("/api/v1/me").await;
    assert_eq!(told.headers["x-ratelimit-limit"], "234567");
    let told = owner.get("/auth/me").await;
    assert_eq!(told.headers["x-ratelimit-limit"], "123457");
    let told = owner.integration().get("/v1/usage").await;
    assert_eq!(told.gives(200)["meters"][0]["limit"], 345_678);
}
