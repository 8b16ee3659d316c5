//! What a client says, line by line. It may be keys: what was read is overwritten as soon as the next line is asked for,
//! and at the end.

use std::io;

use mesh_types::limits::UAPI_LINE_BYTES_MAX;
use tokio::io::{AsyncRead, AsyncReadExt as _};
use zeroize::{Zeroize as _, Zeroizing};

/// Bytes asked for at once: some hundred allowed prefixes.
const BUFFER_BYTES: usize = 4096;

/// One of them.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Read<'a> {
    /// Without its end.
    Line(&'a [u8]),
    /// Nothing of it is kept.
    TooLong,
    /// The client went away within a line.
    Cut,
    End,
}

/// See the module's documentation.
pub(super) struct Lines<R> {
    reader: R,
    buffer: Zeroizing<Vec<u8>>,
    /// What of the buffer is still to be read.
    from: usize,
    to: usize,
    /// The line; has room for the longest there is, and never grows.
    line: Zeroizing<Vec<u8>>,
}

impl<R: AsyncRead + Unpin> Lines<R> {
    pub(super) fn new(reader: R) -> Self {
        let line = Zeroizing::new(Vec::with_capacity(UAPI_LINE_BYTES_MAX));
        Self { reader, buffer: Zeroizing::new(vec![0; BUFFER_BYTES]), from: 0, to: 0, line }
    }

    /// The next line, of which no more is kept than a line may have.
    pub(super) async fn next(&mut self) -> io::Result<Read<'_>> {
        self.line.as_mut_slice().zeroize();
        self.line.clear();
        let mut too_long = false;
        loop {
            if self.from == self.to {
                self.from = 0;
                self.to = self.reader.read(&mut self.buffer).await?;
            }
            let rest = self.buffer.get_mut(self.from..self.to).unwrap_or_default();
            if rest.is_empty() {
                let nothing = self.line.is_empty() && !too_long;
                return Ok(if nothing { Read::End } else { Read::Cut });
            }
            let end = rest.iter().position(|byte| *byte == b'\n');
            let (part, _) = rest.split_at_mut(end.unwrap_or(rest.len()));
            too_long |= self.line.len() + part.len() > UAPI_LINE_BYTES_MAX;
            if !too_long {
                self.line.extend_from_slice(part);
            }
            self.from += part.len() + usize::from(end.is_some());
            part.zeroize();
            if end.is_some() {
                // As everybody's scanner of lines takes them.
                if let Some(line) = self.line.strip_suffix(b"\r").map(<[u8]>::len) {
                    self.line.truncate(line);
                }
                return Ok(if too_long { Read::TooLong } else { Read::Line(&self.line) });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_was_read_is_overwritten() {
        let said = b"private_key=secret\nlisten_port=1\n";
        let mut lines = Lines::new(said.as_slice());
        assert_eq!(lines.next().await.expect("memory reads"), Read::Line(b"private_key=secret"));
        assert_eq!(lines.next().await.expect("memory reads"), Read::Line(b"listen_port=1"));
        let left: Vec<u8> = lines.buffer.iter().copied().filter(|byte| *byte != 0).collect();
        assert_eq!(left, b"\n\n", "line ends are no secrets");
        assert_eq!(lines.next().await.expect("memory reads"), Read::End);
        assert!(lines.line.is_empty());
    }
}
