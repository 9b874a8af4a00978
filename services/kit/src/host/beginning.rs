//! The beginning of a connection: its first bytes, which tell what is spoken.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf};

/// What HTTP/2 begins with, and nothing else.
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// A connection on which somebody has begun to speak. What was read of it is read again.
pub(super) struct Begun<S> {
    stream: S,
    first: [u8; PREFACE.len()],
    read: usize,
    given: usize,
}

impl<S: AsyncRead + Unpin> Begun<S> {
    /// Waits until it can be told what is spoken.
    pub(super) async fn read(mut stream: S) -> io::Result<Self> {
        let (mut first, mut read) = ([0; PREFACE.len()], 0);
        while read < PREFACE.len() && first[..read] == PREFACE[..read] {
            match stream.read(&mut first[read..]).await? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                count => read += count,
            }
        }
        Ok(Self { stream, first, read, given: 0 })
    }

    pub(super) fn is_http2(&self) -> bool {
        self.first == *PREFACE
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Begun<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let Self { stream, first, read, given } = &mut *self;
        if given < read {
            let count = buffer.remaining().min(*read - *given);
            buffer.put_slice(&first[*given..*given + count]);
            *given += count;
            return Poll::Ready(Ok(()));
        }
        Pin::new(stream).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Begun<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, pieces)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt as _;

    use super::*;

    #[tokio::test]
    async fn it_is_told_apart_by_its_first_bytes_and_none_of_them_is_lost() {
        for (said, is_http2) in [
            (&b"GET / HTTP/1.0\r\n\r\n"[..], false),
            (b"POST /v1/licenses/validate HTTP/1.1\r\n\r\n", false),
            (b"PRI * HTTP/1.1\r\n\r\n", false),
            (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\nwhat follows", true),
        ] {
            for step in [1, 5, said.len()] {
                let (mut here, there) = tokio::io::duplex(1);
                let speaking = async move {
                    for piece in said.chunks(step) {
                        here.write_all(piece).await.unwrap();
                    }
                };
                let hearing = async {
                    let mut begun = Begun::read(there).await.unwrap();
                    let (mut heard, known) = (Vec::new(), begun.is_http2());
                    begun.read_to_end(&mut heard).await.unwrap();
                    (heard, known)
                };
                let ((), heard) = tokio::join!(speaking, hearing);
                assert_eq!(heard, (said.to_vec(), is_http2));
            }
        }
    }

    #[tokio::test]
    async fn who_leaves_before_anything_can_be_told_has_not_begun() {
        for said in [&b""[..], b"P", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r"] {
            assert!(Begun::read(said).await.is_err(), "{said:?}");
        }
    }
}
