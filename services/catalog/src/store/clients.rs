//! Clients, as rows.

use paperkey_kit::{
    db::{DbError, check},
    events::CLIENT_DELETED,
    ids::new_id,
    values::Page,
};
use sea_orm::{
    ActiveModelTrait as _, ColumnTrait as _, Condition, ConnectionTrait, EntityTrait as _, IntoActiveModel as _,
    QueryFilter as _, QueryOrder as _, QuerySelect as _, Select, sea_query::Expr,
};
use serde_json::json;

use super::{Act, Failure, TenantStore};
use crate::domain::{
    Fault,
    client::{Changes, Client, Details, comparable},
    could_be_id,
};

mod entity {
    #![expect(unreachable_pub, reason = "the macros of sea-orm make public items")]
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, DeriveEntityModel)]
    #[sea_orm(table_name = "clients")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub id: String,
        pub team_id: String,
        pub mode: String,
        pub name: String,
        pub email: Option<String>,
        pub email_lower: Option<String>,
        pub company: Option<String>,
        pub metadata: Option<String>,
        pub created_at_ms: i64,
        pub updated_at_ms: i64,
    }

    #[derive(Clone, Copy, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

use entity::{ActiveModel, Column, Entity, Model};

/// Who keeps something of a client: its licences name it.
const KEEPERS: [&str; 1] = ["licensing"];

impl TenantStore {
    /// Writes a new client.
    pub(crate) async fn create_client(&self, details: Details, act: Act) -> Result<Client, Failure> {
        let now_ms = self.store.clock.now_ms();
        let id = new_id("cli", &self.store.clock);
        let client = Client { id, details, created_at_ms: now_ms, updated_at_ms: now_ms };
        let row = self.client_row(&client);
        self.store
            .database
            .write(move |tx| async move {
                tx.audit(act.on(vec![client.id.clone()]));
                Entity::insert(row).exec_without_returning(&tx).await?;
                act.answer(&tx, &client)?;
                Ok(client)
            })
            .await
    }

    /// One client.
    pub(crate) async fn client(&self, id: &str) -> Result<Client, Failure> {
        let scope = self.one_client(id)?;
        let found = self.store.database.read(move |reader| async move { first(scope, &reader).await }).await?;
        found.ok_or_else(|| Fault::NoSuchClient.into())
    }

    /// A page of them, newest first, and the token of the next; only those of an email address where one is named.
    pub(crate) async fn clients(
        &self,
        email: Option<String>,
        page: Page,
    ) -> Result<(Vec<Client>, Option<String>), Failure> {
        let mut query = self.all_clients().order_by_desc(Column::Id).limit(page.size + 1);
        if let Some(email) = email {
            query = query.filter(Column::EmailLower.eq(comparable(&email)));
        }
        if let Some(before) = &page.before {
            query = query.filter(Column::Id.lt(before));
        }
        let rows = self
            .store
            .database
            .read(move |reader| async move { query.all(&reader).await.map_err(Failure::from) })
            .await?;
        let (rows, next) = page.cut(rows, |row| &row.id);
        let clients = rows.into_iter().map(client).collect::<Result<_, _>>()?;
        Ok((clients, next))
    }

    /// Changes one.
    pub(crate) async fn update_client(&self, id: &str, changes: Changes, act: Act) -> Result<Client, Failure> {
        let scope = self.one_client(id)?;
        // Touching the row locks it, so that two merges of its metadata follow each other on either engine.
        let lock = Entity::update_many()
            .col_expr(Column::UpdatedAtMs, Expr::col(Column::UpdatedAtMs))
            .filter(check(self.own_clients()))
            .filter(Column::Id.eq(id));
        let this = self.clone();
        self.store
            .database
            .write(move |tx| async move {
                lock.exec(&tx).await?;
                let before = first(scope, &tx).await?.ok_or(Fault::NoSuchClient)?;
                let details = before.details.changed(changes).map_err(Failure::Invalid)?;
                if details == before.details {
                    return Ok(before);
                }
                let after = Client { details, updated_at_ms: this.store.clock.now_ms(), ..before };
                let write = Entity::update_many().set(this.client_row(&after));
                write.filter(check(this.own_clients())).filter(Column::Id.eq(&after.id)).exec(&tx).await?;
                tx.audit(act.on(vec![after.id.clone()]));
                Ok(after)
            })
            .await
    }

    /// Deletes one, and tells those who name it.
    pub(crate) async fn delete_client(&self, id: &str, act: Act) -> Result<(), Failure> {
        // The caller may name anything; what cannot be an id is not there.
        if !could_be_id(id) {
            return Err(Fault::NoSuchClient.into());
        }
        let delete = Entity::delete_many().filter(check(self.own_clients())).filter(Column::Id.eq(id));
        let (this, id) = (self.clone(), id.to_owned());
        self.store
            .database
            .write(move |tx| async move {
                if delete.exec(&tx).await?.rows_affected == 0 {
                    return Err(Fault::NoSuchClient.into());
                }
                this.store.outbox.emit(&tx, &KEEPERS, CLIENT_DELETED, &this.tenant, "", &json!({"id": id}));
                tx.audit(act.on(vec![id]));
                Ok(())
            })
            .await
    }

    fn own_clients(&self) -> Condition {
        Condition::all().add(Column::TeamId.eq(&self.tenant.team_id)).add(Column::Mode.eq(self.tenant.mode_word()))
    }

    fn all_clients(&self) -> Select<Entity> {
        Entity::find().filter(self.own_clients())
    }

    fn one_client(&self, id: &str) -> Result<Select<Entity>, Fault> {
        if could_be_id(id) {
            Ok(Entity::find().filter(check(self.own_clients())).filter(Column::Id.eq(id)))
        } else {
            Err(Fault::NoSuchClient)
        }
    }

    fn client_row(&self, client: &Client) -> ActiveModel {
        let details = client.details.clone();
        let row = Model {
            id: client.id.clone(),
            team_id: self.tenant.team_id.clone(),
            mode: self.tenant.mode_word().to_owned(),
            name: details.name,
            email_lower: details.email.as_deref().map(comparable),
            email: details.email,
            company: details.company,
            metadata: details.metadata.map(|metadata| metadata.to_string()),
            created_at_ms: client.created_at_ms,
            updated_at_ms: client.updated_at_ms,
        };
        // What comes of a row counts as written already; all of it is to be written.
        row.into_active_model().reset_all()
    }
}

async fn first(query: Select<Entity>, connection: &impl ConnectionTrait) -> Result<Option<Client>, Failure> {
    query.one(connection).await?.map(client).transpose()
}

fn client(row: Model) -> Result<Client, Failure> {
    let metadata = row.metadata.map(|text| serde_json::from_str(&text)).transpose();
    let metadata = metadata.map_err(|_| DbError::Internal("metadata of a client is not JSON".to_owned()))?;
    let details = Details { name: row.name, email: row.email, company: row.company, metadata };
    Ok(Client { id: row.id, details, created_at_ms: row.created_at_ms, updated_at_ms: row.updated_at_ms })
}
