//! The rows.

pub(super) mod users {
    use std::fmt;

    use sea_orm::entity::prelude::*;

    #[derive(Clone, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "users")]
    pub(crate) struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub(crate) id: String,
        pub(crate) email_lower: String,
        pub(crate) email: String,
        pub(crate) name: Option<String>,
        pub(crate) password_hash: String,
        pub(crate) session_epoch: i64,
        pub(crate) created_at_ms: i64,
    }

    impl fmt::Debug for Model {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.debug_struct("Model").field("id", &self.id).finish_non_exhaustive()
        }
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub(crate) enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

pub(super) mod teams {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "teams")]
    pub(crate) struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub(crate) id: String,
        pub(crate) name: String,
        pub(crate) tier: String,
        pub(crate) sandbox: bool,
        pub(crate) created_at_ms: i64,
        pub(crate) leak_action: String,
        pub(crate) expires_at_ms: Option<i64>,
        pub(crate) deleted_at_ms: Option<i64>,
        pub(crate) requests_per_minute: Option<i64>,
        pub(crate) invited_since_ms: Option<i64>,
        pub(crate) invited_count: i64,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub(crate) enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

pub(super) mod memberships {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "memberships")]
    pub(crate) struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub(crate) team_id: String,
        #[sea_orm(primary_key, auto_increment = false)]
        pub(crate) user_id: String,
        pub(crate) role: String,
        pub(crate) created_at_ms: i64,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub(crate) enum Relation {
        #[sea_orm(belongs_to = "super::teams::Entity", from = "Column::TeamId", to = "super::teams::Column::Id")]
        Team,
        #[sea_orm(belongs_to = "super::users::Entity", from = "Column::UserId", to = "super::users::Column::Id")]
        User,
    }

    impl Related<super::users::Entity> for Entity {
        fn to() -> RelationDef {
            Relation::User.def()
        }
    }

    impl Related<super::teams::Entity> for Entity {
        fn to() -> RelationDef {
            Relation::Team.def()
        }
    }

    impl ActiveModelBehavior for ActiveModel {}
}

pub(super) mod keys {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "keys")]
    #[expect(clippy::struct_excessive_bools, reason = "a row is what its table is")]
    pub(crate) struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub(crate) id: String,
        pub(crate) kind: String,
        pub(crate) team_id: Option<String>,
        pub(crate) mode: String,
        pub(crate) user_id: Option<String>,
        pub(crate) created_by: Option<String>,
        pub(crate) name: String,
        pub(crate) token_hash: Vec<u8>,
        pub(crate) shown_prefix: String,
        pub(crate) scopes: String,
        pub(crate) read_only: bool,
        pub(crate) allowlist: Option<String>,
        pub(crate) enabled: bool,
        pub(crate) expires_at_ms: Option<i64>,
        pub(crate) created_at_ms: i64,
        pub(crate) revoked_at_ms: Option<i64>,
        pub(crate) revoked_by: Option<String>,
        pub(crate) created_by_name: Option<String>,
        pub(crate) revoked_by_name: Option<String>,
        pub(crate) superseded_by: Option<String>,
        pub(crate) replaces: Option<String>,
        pub(crate) lineage: Option<String>,
        pub(crate) rotated_at_ms: Option<i64>,
        pub(crate) first_used_at_ms: Option<i64>,
        pub(crate) last_used_at_ms: Option<i64>,
        pub(crate) requests_per_minute: Option<i64>,
        pub(crate) rotate_every_days: Option<i64>,
        pub(crate) rotation_due_at_ms: Option<i64>,
        pub(crate) rotation_told_at_ms: Option<i64>,
        pub(crate) self_rotated: bool,
        pub(crate) given_to: Option<String>,
        pub(crate) leak_told_at_ms: Option<i64>,
        pub(crate) expiry_told: i64,
        pub(crate) temporary: bool,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub(crate) enum Relation {
        #[sea_orm(belongs_to = "super::teams::Entity", from = "Column::TeamId", to = "super::teams::Column::Id")]
        Team,
    }

    impl Related<super::teams::Entity> for Entity {
        fn to() -> RelationDef {
            Relation::Team.def()
        }
    }

    impl ActiveModelBehavior for ActiveModel {}
}

pub(super) mod product_registry {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "product_registry")]
    pub(crate) struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub(crate) product_id: String,
        pub(crate) team_id: String,
        pub(crate) mode: String,
        pub(crate) deleted: bool,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub(crate) enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

pub(super) mod product_keys {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "product_keys")]
    pub(crate) struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub(crate) id: String,
        pub(crate) team_id: String,
        pub(crate) mode: String,
        pub(crate) product_id: String,
        pub(crate) public_key: String,
        pub(crate) public_hash: Vec<u8>,
        pub(crate) secret_hash: Vec<u8>,
        pub(crate) secret_prefix: String,
        pub(crate) created_at_ms: i64,
        pub(crate) revoked_at_ms: Option<i64>,
        pub(crate) revoked_by: Option<String>,
        pub(crate) leak_told_at_ms: Option<i64>,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub(crate) enum Relation {
        #[sea_orm(belongs_to = "super::teams::Entity", from = "Column::TeamId", to = "super::teams::Column::Id")]
        Team,
    }

    impl Related<super::teams::Entity> for Entity {
        fn to() -> RelationDef {
            Relation::Team.def()
        }
    }

    impl ActiveModelBehavior for ActiveModel {}
}

pub(super) mod invitations {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "invitations")]
    pub(crate) struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub(crate) id: String,
        pub(crate) team_id: String,
        pub(crate) email_lower: String,
        pub(crate) email: String,
        pub(crate) role: String,
        pub(crate) token_hash: Vec<u8>,
        pub(crate) invited_by: String,
        pub(crate) created_at_ms: i64,
        pub(crate) expires_at_ms: i64,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub(crate) enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

pub(super) mod password_resets {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "password_resets")]
    pub(crate) struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub(crate) id: String,
        pub(crate) token_hash: Vec<u8>,
        pub(crate) user_id: Option<String>,
        pub(crate) created_at_ms: i64,
        pub(crate) expires_at_ms: i64,
        pub(crate) mailed_at_ms: Option<i64>,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub(crate) enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

pub(super) mod mails {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "mails")]
    pub(crate) struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub(crate) id: String,
        pub(crate) sealed: Vec<u8>,
        pub(crate) attempts: i64,
        pub(crate) due_at_ms: i64,
        pub(crate) created_at_ms: i64,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub(crate) enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

pub(super) mod login_failures {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "login_failures")]
    pub(crate) struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub(crate) email_hash: Vec<u8>,
        pub(crate) failures: i64,
        pub(crate) since_ms: i64,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub(crate) enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

pub(super) mod quota_usage {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "quota_usage")]
    pub(crate) struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub(crate) team_id: String,
        #[sea_orm(primary_key, auto_increment = false)]
        pub(crate) meter: String,
        #[sea_orm(primary_key, auto_increment = false)]
        pub(crate) month: String,
        pub(crate) used: i64,
        pub(crate) warned_at_ms: Option<i64>,
        pub(crate) warned_limit: Option<i64>,
        pub(crate) exceeded_at_ms: Option<i64>,
        pub(crate) exceeded_limit: Option<i64>,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub(crate) enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

pub(super) mod quota_days {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "quota_days")]
    pub(crate) struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub(crate) team_id: String,
        #[sea_orm(primary_key, auto_increment = false)]
        pub(crate) meter: String,
        #[sea_orm(primary_key, auto_increment = false)]
        pub(crate) day: String,
        pub(crate) used: i64,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub(crate) enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

pub(super) mod quota_consumptions {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "quota_consumptions")]
    pub(crate) struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub(crate) consume_id: String,
        pub(crate) team_id: String,
        pub(crate) meter: String,
        pub(crate) month: String,
        pub(crate) units: i64,
        pub(crate) used_after: i64,
        pub(crate) limit_then: Option<i64>,
        pub(crate) created_at_ms: i64,
        pub(crate) refunded_at_ms: Option<i64>,
        pub(crate) day: Option<String>,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub(crate) enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

pub(super) mod team_quotas {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "team_quotas")]
    pub(crate) struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub(crate) team_id: String,
        #[sea_orm(primary_key, auto_increment = false)]
        pub(crate) meter: String,
        pub(crate) units: i64,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub(crate) enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

pub(super) mod alerts {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "alerts")]
    pub(crate) struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub(crate) id: String,
        pub(crate) team_id: String,
        pub(crate) mode: String,
        pub(crate) cause: String,
        pub(crate) subject: String,
        pub(crate) hour: i64,
        pub(crate) count: i64,
        pub(crate) message: String,
        pub(crate) details: String,
        pub(crate) created_at_ms: i64,
        pub(crate) last_at_ms: i64,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub(crate) enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

pub(super) mod key_networks {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "key_networks")]
    pub(crate) struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub(crate) key_id: String,
        #[sea_orm(primary_key, auto_increment = false)]
        pub(crate) network: String,
        pub(crate) team_id: String,
        pub(crate) first_seen_ms: i64,
        pub(crate) last_seen_ms: i64,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub(crate) enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}
