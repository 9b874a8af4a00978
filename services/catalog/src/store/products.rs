//! Products, as rows.

use paperkey_kit::{db::DbError, events::PRODUCT_DELETED, values::Page};
use sea_orm::{
    ActiveModelTrait as _, ColumnTrait as _, ConnectionTrait, EntityTrait as _, IntoActiveModel as _, QueryFilter as _,
    QueryOrder as _, QuerySelect as _, Select, sea_query::Expr,
};
use serde_json::json;

use super::{Act, Failure, TenantStore, drafts::complete};
use crate::{
    KEEPERS,
    domain::{
        Fault, could_be_id,
        product::{Changes, Details, Price, Product},
    },
};

mod entity {
    #![expect(unreachable_pub, reason = "the macros of sea-orm make public items")]
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, DeriveEntityModel)]
    #[sea_orm(table_name = "products")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub id: String,
        pub team_id: String,
        pub mode: String,
        pub name: String,
        pub description: Option<String>,
        pub sku: Option<String>,
        pub price_amount: Option<i64>,
        pub price_currency: Option<String>,
        pub unit: Option<String>,
        pub active: bool,
        pub metadata: Option<String>,
        pub created_at_ms: i64,
        pub updated_at_ms: i64,
    }

    #[derive(Clone, Copy, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

use entity::{ActiveModel, Column, Entity, Model};

impl TenantStore {
    /// Writes the product that a draft was for.
    pub(crate) async fn create(&self, id: String, details: Details, act: Act) -> Result<Product, Failure> {
        let now_ms = self.store.clock.now_ms();
        let product = Product { id, details, created_at_ms: now_ms, updated_at_ms: now_ms };
        let row = self.row(&product);
        self.store
            .database
            .write(move |tx| async move {
                complete(&tx, &product.id).await?;
                tx.audit(act.on(vec![product.id.clone()]));
                Entity::insert(row).exec_without_returning(&tx).await?;
                act.answer(&tx, &product)?;
                Ok(product)
            })
            .await
    }

    /// One product.
    pub(crate) async fn get(&self, id: String) -> Result<Product, Failure> {
        let scope = self.one(id)?;
        let found = self.store.database.read(move |reader| async move { first(scope, &reader).await }).await?;
        found.ok_or_else(|| Fault::NoSuchProduct.into())
    }

    /// A page of them, newest first, and the token of the next.
    pub(crate) async fn list(&self, page: Page) -> Result<(Vec<Product>, Option<String>), Failure> {
        let mut query = self.all().order_by_desc(Column::Id).limit(page.size + 1);
        if let Some(before) = &page.before {
            query = query.filter(Column::Id.lt(before));
        }
        let rows = self
            .store
            .database
            .read(move |reader| async move { query.all(&reader).await.map_err(Failure::from) })
            .await?;
        let (rows, next) = page.cut(rows, |row| &row.id);
        let products = rows.into_iter().map(product).collect::<Result<_, _>>()?;
        Ok((products, next))
    }

    /// Changes one.
    pub(crate) async fn update(&self, id: String, changes: Changes, act: Act) -> Result<Product, Failure> {
        let scope = self.one(id.clone())?;
        // Touching the row locks it, so that two merges of its metadata follow each other on either engine.
        let lock = Entity::update_many()
            .col_expr(Column::UpdatedAtMs, Expr::col(Column::UpdatedAtMs))
            .filter(self.condition())
            .filter(Column::Id.eq(id));
        let this = self.clone();
        self.store
            .database
            .write(move |tx| async move {
                lock.exec(&tx).await?;
                let before = first(scope, &tx).await?.ok_or(Fault::NoSuchProduct)?;
                let details = before.details.changed(changes).map_err(Failure::Invalid)?;
                if details == before.details {
                    return Ok(before);
                }
                let after = Product { details, updated_at_ms: this.store.clock.now_ms(), ..before };
                let write = Entity::update_many().set(this.row(&after));
                write.filter(this.condition()).filter(Column::Id.eq(&after.id)).exec(&tx).await?;
                tx.audit(act.on(vec![after.id.clone()]));
                Ok(after)
            })
            .await
    }

    /// Deletes one, and tells those who keep something of it.
    pub(crate) async fn delete(&self, id: String, act: Act) -> Result<(), Failure> {
        // The caller may name anything; what cannot be an id is not there.
        if !could_be_id(&id) {
            return Err(Fault::NoSuchProduct.into());
        }
        let delete = Entity::delete_many().filter(self.condition()).filter(Column::Id.eq(&id));
        let this = self.clone();
        self.store
            .database
            .write(move |tx| async move {
                if delete.exec(&tx).await?.rows_affected == 0 {
                    return Err(Fault::NoSuchProduct.into());
                }
                this.store.outbox.emit(&tx, &KEEPERS, PRODUCT_DELETED, &this.tenant, &id, &json!({"id": id}));
                tx.audit(act.on(vec![id]));
                Ok(())
            })
            .await
    }

    fn condition(&self) -> sea_orm::Condition {
        sea_orm::Condition::all()
            .add(Column::TeamId.eq(&self.tenant.team_id))
            .add(Column::Mode.eq(self.tenant.mode_word()))
    }

    fn all(&self) -> Select<Entity> {
        Entity::find().filter(self.condition())
    }

    fn one(&self, id: String) -> Result<Select<Entity>, Fault> {
        if could_be_id(&id) { Ok(self.all().filter(Column::Id.eq(id))) } else { Err(Fault::NoSuchProduct) }
    }

    fn row(&self, product: &Product) -> ActiveModel {
        let details = product.details.clone();
        let (price_amount, price_currency) = details.price.map(|price| (price.amount, price.currency)).unzip();
        let row = Model {
            id: product.id.clone(),
            team_id: self.tenant.team_id.clone(),
            mode: self.tenant.mode_word().to_owned(),
            name: details.name,
            description: details.description,
            sku: details.sku,
            price_amount,
            price_currency,
            unit: details.unit,
            active: details.active,
            metadata: details.metadata.map(|metadata| metadata.to_string()),
            created_at_ms: product.created_at_ms,
            updated_at_ms: product.updated_at_ms,
        };
        // What comes of a row counts as written already; all of it is to be written.
        row.into_active_model().reset_all()
    }
}

async fn first(query: Select<Entity>, connection: &impl ConnectionTrait) -> Result<Option<Product>, Failure> {
    query.one(connection).await?.map(product).transpose()
}

fn product(row: Model) -> Result<Product, Failure> {
    let metadata = row.metadata.map(|text| serde_json::from_str(&text)).transpose();
    let metadata = metadata.map_err(|_| DbError::Internal("metadata of a product is not JSON".to_owned()))?;
    let price = row.price_amount.zip(row.price_currency).map(|(amount, currency)| Price { amount, currency });
    let details = Details {
        name: row.name,
        description: row.description,
        sku: row.sku,
        price,
        unit: row.unit,
        active: row.active,
        metadata,
    };
    Ok(Product { id: row.id, details, created_at_ms: row.created_at_ms, updated_at_ms: row.updated_at_ms })
}
