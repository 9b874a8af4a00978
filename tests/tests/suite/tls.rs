//! HTTPS: at the public listener, and between the processes of a fleet.

use http::Method;
use paperkey_tests::{
    Installation, Settings, eventually,
    installation::SERVICES,
    tls::{Authority, Caller, Pair},
};
use serde_json::json;
use tempfile::TempDir;

/// Certificates on disk, and an installation that is told of them.
struct House {
    authority: Authority,
    folder: TempDir,
    pair: Pair,
}

impl House {
    fn new() -> Self {
        let (authority, folder) = (Authority::new(), TempDir::with_prefix("paperkey-tls-").unwrap());
        authority.write(&folder.path().join("ca.crt"));
        let pair = authority.issue();
        let house = Self { authority, folder, pair };
        house.write(&house.pair);
        house
    }

    fn write(&self, pair: &Pair) {
        let path = |name: &str| self.folder.path().join(name);
        pair.write(&path("tls.crt"), &path("tls.key"));
    }

    fn settings(&self, mutual: bool) -> Settings {
        let path = |name: &str| self.folder.path().join(name).to_str().unwrap().to_owned();
        let mut environment = vec![("PAPERKEY__TLS__CERT", path("tls.crt")), ("PAPERKEY__TLS__KEY", path("tls.key"))];
        if mutual {
            environment.push(("PAPERKEY__TLS__CLIENT_CA", path("ca.crt")));
        }
        Settings { environment, https: true, ..Settings::default() }
    }

    /// Somebody of the public, who shows nothing.
    fn public(&self) -> Caller {
        self.authority.caller(None)
    }
}

/// Makes an account, which takes the gateway and auth.
async fn registers(caller: &Caller, install: &Installation, email: &str) {
    let at = install.address_of(install.gateway());
    let account = json!({"email": email, "password": "correct horse battery"});
    let (answer, _) = caller.call(at, Method::POST, "/auth/register", Some(&account)).await.unwrap();
    assert!(answer.status.is_success(), "{}: {}", answer.status, answer.text());
}

async fn shows_new_certificates(house: &House, install: &Installation) {
    let at = install.address_of(install.gateway());
    let shown = async || house.public().call(at, Method::GET, "/v1/status", None).await.unwrap().1;
    assert_eq!(shown().await, house.pair.der());
    let renewed = house.authority.issue();
    house.write(&renewed);
    eventually("the new certificate is shown", || async { (shown().await == renewed.der()).then_some(()) }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_in_one_process_speaks_https_and_shows_new_certificates_without_a_restart() {
    let house = House::new();
    let install = Installation::all_in_one_with(house.settings(false)).await;
    registers(&house.public(), &install, "first@example.com").await;
    shows_new_certificates(&house, &install).await;
    registers(&house.public(), &install, "second@example.com").await;
    // Links in answers lead to where it is reached.
    let at = install.address_of(install.gateway());
    let (page, _) = house.public().call(at, Method::GET, "/llms.txt", None).await.unwrap();
    assert!(page.text().contains(&format!("https://{at}")), "{}", page.text());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_processes_of_a_fleet_let_in_only_each_other_and_take_up_new_certificates() {
    let house = House::new();
    let Some(install) = Installation::fleet_with(house.settings(true)).await else { return };
    registers(&house.public(), &install, "first@example.com").await;
    let foreign = Authority::new().issue();
    for service in SERVICES {
        let at = install.address_of(service);
        for stranger in [house.public(), house.authority.caller(Some(&foreign))] {
            assert!(stranger.call(at, Method::GET, "/", None).await.is_err(), "{service} lets strangers in");
        }
        let peer = house.authority.caller(Some(&house.pair));
        assert!(peer.call(at, Method::GET, "/", None).await.is_ok(), "{service} lets no peer in");
    }
    shows_new_certificates(&house, &install).await;
    registers(&house.public(), &install, "second@example.com").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_with_certificates_that_are_none_says_which_file_is_wrong() {
    let house = House::new();
    std::fs::write(house.folder.path().join("tls.crt"), "nonsense").unwrap();
    let mut settings = house.settings(false);
    let install = Installation::all_in_one().await;
    let mut command = install.prepared(&["serve", "--listen", "127.0.0.1:0", "--ops-listen", "127.0.0.1:0"]);
    command.envs(settings.environment.drain(..));
    let output = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("tls.crt holds no certificate"), "{said}");
}
