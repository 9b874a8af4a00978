//! Mail: how it leaves the installation.
//!
//! Over SMTP, or, where none is configured, into files of the data folder. What is to be sent waits in the database, put
//! there by whoever has something to tell; [`carrier`] takes it from there, again and again until it is gone or of no
//! more use.
//!
//! Deliberately absent: HTML, attachments, and any answer to what comes back.

mod carrier;
mod files;
#[cfg(test)]
mod tests;

use std::{
    fmt,
    path::PathBuf,
    time::{Duration, UNIX_EPOCH},
};

use lettre::{
    Address, AsyncSmtpTransport, AsyncTransport as _, Message, Tokio1Executor,
    message::{
        Body, Mailbox,
        header::{ContentTransferEncoding, ContentType},
    },
    transport::smtp::extension::ClientId,
};
use paperkey_kit::secrets::Secret;

use crate::domain::letter::Text;

pub(crate) use carrier::{carry, wait_ms};

/// How long one step of a conversation with a mail server may take.
const STEP_TIMEOUT: Duration = Duration::from_secs(20);

/// The longest line that a mail may have, without its end (RFC 5322).
const MAX_LINE_BYTES: usize = 998;

/// How the installation sends mail.
#[derive(Clone)]
pub struct Mail {
    from: Mailbox,
    way: Way,
}

#[derive(Clone)]
enum Way {
    Smtp(AsyncSmtpTransport<Tokio1Executor>),
    Files(PathBuf),
}

/// Mail is not configured in a way that could work.
#[derive(Debug, thiserror::Error)]
pub enum BadMail {
    /// The server's address.
    #[error(
        "mail.smtp_url must be a URL such as smtps://user:password@mail.example.com, or smtp://…?tls=required for STARTTLS"
    )]
    SmtpUrl,
    /// The sender's address.
    #[error("mail.from must be an address such as Paperkey <paperkey@example.com>")]
    From,
}

/// A mail did not go out. What a server says may name an address, so nothing of it is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NotSent {
    #[error("the address cannot be mailed to")]
    Address,
    #[error("the mail server refused it with {0}")]
    Refused(u16),
    #[error("the mail server did not answer in time")]
    Timeout,
    #[error("the connection to the mail server is not secure")]
    Tls,
    #[error("the mail server cannot be reached, or does not speak SMTP")]
    Connection,
    #[error("the file cannot be written")]
    File,
}

impl Mail {
    /// Mail over that server, or where there is none into that folder. The URL is as lettre reads it:
    /// `smtp://` or `smtps://`, credentials, `?tls=required` or `?tls=opportunistic`.
    pub fn new(smtp_url: Option<&Secret>, from: &str, folder: PathBuf) -> Result<Self, BadMail> {
        let from: Mailbox = from.parse().map_err(|_| BadMail::From)?;
        let way = match smtp_url {
            None => Way::Files(folder),
            Some(url) => {
                let builder = AsyncSmtpTransport::<Tokio1Executor>::from_url(url.expose());
                // The error may hold the URL, and with it the password.
                let builder = builder.map_err(|_| BadMail::SmtpUrl)?.timeout(Some(STEP_TIMEOUT));
                Way::Smtp(builder.hello_name(ClientId::Domain(from.email.domain().to_owned())).build())
            }
        };
        Ok(Self { from, way })
    }

    /// Whether mails reach nobody by themselves, so that whoever sends a link must be told it.
    pub(crate) fn stays_here(&self) -> bool {
        matches!(self.way, Way::Files(_))
    }

    /// Sends one mail.
    pub(crate) async fn send(&self, id: &str, to: &str, text: Text, now_ms: i64) -> Result<(), NotSent> {
        let message = self.message(id, to, text, now_ms)?;
        match &self.way {
            Way::Smtp(server) => match server.send(message).await {
                Ok(_) => Ok(()),
                Err(error) => Err(match error.status() {
                    Some(code) => NotSent::Refused(u16::from(code)),
                    None if error.is_timeout() => NotSent::Timeout,
                    None if error.is_tls() => NotSent::Tls,
                    None => NotSent::Connection,
                }),
            },
            Way::Files(folder) => {
                files::write(folder.clone(), id.to_owned(), message.formatted()).await.map_err(|error| {
                    tracing::debug!(%error, "a mail could not be written");
                    NotSent::File
                })
            }
        }
    }

    fn message(&self, id: &str, to: &str, text: Text, now_ms: i64) -> Result<Message, NotSent> {
        let to: Address = to.parse().map_err(|_| NotSent::Address)?;
        let at = UNIX_EPOCH + Duration::from_millis(u64::try_from(now_ms).unwrap_or(0));
        Message::builder()
            .from(self.from.clone())
            .to(Mailbox::new(None, to))
            .subject(text.subject)
            .date(at)
            .message_id(Some(format!("<{id}@{}>", self.from.email.domain())))
            .header(ContentType::TEXT_PLAIN)
            .body(body_of(text.body))
            .map_err(|_| NotSent::Address)
    }
}

/// A text as it is where that can be: people who read a mail as a file find its link whole.
fn body_of(text: String) -> Body {
    let is_plain = |line: &str| line.len() <= MAX_LINE_BYTES && line.is_ascii() && !line.contains(['\0', '\r']);
    if text.split('\n').all(is_plain) {
        Body::dangerous_pre_encoded(text.replace('\n', "\r\n").into_bytes(), ContentTransferEncoding::SevenBit)
    } else {
        Body::new(text)
    }
}

impl fmt::Debug for Mail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let way = if self.stays_here() { "files" } else { "SMTP" };
        f.debug_struct("Mail").field("way", &way).finish_non_exhaustive()
    }
}

/// Whether mail could be sent to an address at all.
pub(crate) fn is_mailable(address: &str) -> bool {
    address.parse::<Address>().is_ok()
}
