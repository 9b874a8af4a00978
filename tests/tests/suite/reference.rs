//! The reference, as others read it: a linter finds nothing, and a client that makes calls up from it gets the answers that
//! it tells of, on every surface.
//!
//! The ids and keys of the examples are replaced by those of somebody who has one of everything, so that many of the calls
//! lead somewhere.

use paperkey_tests::{Account, Api, Installation, Receiver, on_both_kinds, people::Key, reference::Judges};
use serde_json::{Value, json};

use super::samples::World;

/// Streams of events go on for as long as somebody reads: the client would wait for their end. `watching` tests them.
const NO_STREAMS: [&str; 2] = ["--exclude-path-regex", "/events$"];

/// What follows the prefix in the ids of the examples.
const ID: &str = "01k6f7q2d8x4m9v3c5t0w1n7za";

on_both_kinds! {
    the_dashboard_surface_answers_as_it_says,
    the_client_surface_answers_as_it_says,
    the_team_surface_answers_as_it_says,
    the_platform_surface_answers_as_it_says,
}

#[tokio::test(flavor = "multi_thread")]
async fn the_document_is_what_a_strict_linter_asks_for_and_its_samples_can_be_read() {
    let Some(judges) = Judges::installed() else { return };
    let install = Installation::all_in_one().await;
    let document = document(&install).await;
    judges.lint(&document).await;
    judges.parse_samples(&document).await;
}

async fn document(install: &Installation) -> Value {
    let answer = Api::of_another(&install.url()).get("/api/openapi.json").await;
    assert_eq!(answer.status, 200);
    answer.json
}

/// Somebody with one of everything, and the document with their ids in its examples.
struct Trial {
    judges: Judges,
    install: Installation,
    world: World,
    mate: Account,
    key: Key,
    receiver: Receiver,
}

impl Trial {
    async fn of(install: Installation) -> Option<Self> {
        let judges = Judges::installed()?;
        let receiver = Receiver::start().await;
        let world = World::of(install.register().await, &receiver).await;
        let mate = world.owner.team_mate(&install, "member").await;
        let key = world.owner.create_key(json!({"name": "Tried out"})).await;
        Some(Self { judges, install, world, mate, key, receiver })
    }

    /// The document, of which the examples of each operation name what is there.
    async fn document(&self) -> Value {
        let mut document = document(&self.install).await;
        let paths = document["paths"].as_object_mut().expect("a document has paths");
        for (path, verbs) in paths {
            let of_product = path.contains("/products/");
            let webhook = if of_product { &self.world.webhook } else { &self.world.team_webhook };
            let key_id = if of_product { &self.world.product.key_id } else { &self.key.id };
            let ids = [
                ("prod_", &self.world.product.id),
                ("lic_", &self.world.license.id),
                ("act_", &self.world.activation_id),
                ("cli_", &self.world.client_id),
                ("wh_", &webhook.id),
                ("dlv_", &self.world.delivery_id),
                ("team_", &self.world.owner.team_id),
                ("usr_", &self.mate.user_id),
                ("key_", key_id),
            ];
            let mut text = verbs.to_string();
            for (prefix, id) in ids {
                text = text.replace(&format!("\"{prefix}{ID}\""), &format!("\"{id}\""));
            }
            let said = [
                ("K7WX9-M3NP4-H8TRC-DJ", self.world.license.key.as_str()),
                ("ada@example.com", &self.world.owner.email),
                ("correct horse battery staple", &self.world.owner.password),
                // Nobody else is to hear of the tests.
                ("https://example.com/webhooks/paperkey", self.receiver.url()),
            ];
            for (example, real) in said {
                text = text.replace(example, real);
            }
            *verbs = serde_json::from_str(&text).expect("ids need no escaping");
        }
        document
    }

    /// Tries out those operations that the arguments leave, by a credential.
    async fn run(&self, credential: &str, operations: &[&[&str]]) {
        let document = self.document().await;
        self.judges.try_out(&document, &self.install.url(), credential, &operations.concat()).await;
    }
}

async fn the_dashboard_surface_answers_as_it_says(install: Installation) {
    let Some(trial) = Trial::of(install).await else { return };
    let dashboard = ["--include-tag-regex", "^Dashboard:"];
    // First everything but what takes away what others need: deletions, and what ends the session or the membership.
    let harmless = [
        "--exclude-method",
        "DELETE",
        "--exclude-operation-id",
        "dashboardLogout",
        "--exclude-operation-id",
        "dashboardLeaveTeam",
    ];
    let account = trial.world.owner.token.clone();
    trial.run(&account, &[&dashboard, &harmless, &NO_STREAMS]).await;
    // What a product's secret key is for.
    let server = ["--include-path-regex", "^/licenses", "--exclude-method", "DELETE"];
    trial.run(&trial.world.product.secret_key, &[&server]).await;
    trial.run(&account, &[&dashboard, &["--include-method", "DELETE"]]).await;
    let ends = ["--include-operation-id", "dashboardLeaveTeam", "--include-operation-id", "dashboardLogout"];
    trial.run(&account, &[&ends]).await;
}

async fn the_client_surface_answers_as_it_says(install: Installation) {
    let Some(trial) = Trial::of(install).await else { return };
    trial.run(&trial.world.product.public_key, &[&["--include-tag-regex", "^Client:"]]).await;
}

async fn the_team_surface_answers_as_it_says(install: Installation) {
    let Some(trial) = Trial::of(install).await else { return };
    let team = ["--include-tag-regex", "^Team:"];
    let key = trial.world.owner.live_key.clone();
    trial.run(&key, &[&team, &["--exclude-method", "DELETE"], &NO_STREAMS]).await;
    trial.run(&key, &[&team, &["--include-method", "DELETE"]]).await;
    // What the installation's billing does.
    let system = trial.install.system_key().await;
    trial.run(&system, &[&["--include-path-regex", "^/api/v1/teams/"]]).await;
}

async fn the_platform_surface_answers_as_it_says(install: Installation) {
    let Some(trial) = Trial::of(install).await else { return };
    let platform = ["--include-tag-regex", "^Platform:"];
    let key = trial.world.owner.live_key.clone();
    trial.run(&key, &[&platform, &["--exclude-method", "DELETE"]]).await;
    trial.run(&key, &[&platform, &["--include-method", "DELETE"]]).await;
}
