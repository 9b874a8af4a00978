//! A server behind a proxy: it answers with what arrived, as JSON, or with what it was told to answer.

use std::{convert::Infallible, net::SocketAddr};

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Request, Response, header::CONTENT_TYPE};
use http_body_util::{BodyExt as _, Full};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::{net::TcpListener, task::JoinHandle};

/// What is answered to everything, where it is not an echo.
#[derive(Clone, Debug)]
pub struct Fixed {
    /// The status.
    pub status: u16,
    /// The headers.
    pub headers: Vec<(&'static str, &'static str)>,
}

/// A local server. It ends when this value goes.
#[derive(Debug)]
pub struct Echo {
    at: SocketAddr,
    serving: JoinHandle<()>,
}

impl Echo {
    /// Listens on a port of its own, and answers 200 with `{method, path, headers, body}`.
    pub async fn start() -> Self {
        Self::serve(None).await
    }

    /// Listens on a port of its own, and always answers the same.
    pub async fn answering(fixed: Fixed) -> Self {
        Self::serve(Some(fixed)).await
    }

    async fn serve(fixed: Option<Fixed>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("there is a free port");
        let at = listener.local_addr().expect("it is bound");
        let serving = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let fixed = fixed.clone();
                let service = service_fn(move |request| answer(request, fixed.clone()));
                tokio::spawn(async move {
                    // A proxy that is killed cuts its connection.
                    let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
                });
            }
        });
        Self { at, serving }
    }

    /// Where it listens, such as `127.0.0.1:3000`.
    pub fn at(&self) -> String {
        self.at.to_string()
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

async fn answer(request: Request<Incoming>, fixed: Option<Fixed>) -> Result<Response<Full<Bytes>>, Infallible> {
    let (head, body) = request.into_parts();
    let body = body.collect().await.map(http_body_util::Collected::to_bytes).unwrap_or_default();
    let Some(fixed) = fixed else {
        let headers: serde_json::Map<String, Value> = head
            .headers
            .keys()
            .map(|name| {
                let values: Vec<_> = head.headers.get_all(name).iter().map(HeaderValue::as_bytes).collect();
                (name.to_string(), String::from_utf8_lossy(&values.join(&b","[..])).into())
            })
            .collect();
        let echo = json!({
            "method": head.method.as_str(),
            "path": head.uri.to_string(),
            "headers": headers,
            "body": String::from_utf8_lossy(&body),
        });
        let mut response = Response::new(Full::new(Bytes::from(echo.to_string())));
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        return Ok(response);
    };
    let mut response = Response::new(Full::new(Bytes::new()));
    *response.status_mut() = fixed.status.try_into().expect("tests name statuses that exist");
    for (name, value) in fixed.headers {
        response.headers_mut().insert(HeaderName::from_static(name), HeaderValue::from_static(value));
    }
    Ok(response)
}
