//! The socket: who may ask, one request after the other, and everything bounded.

#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, FileTypeExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, ensure};
use mesh_types::limits::{UAPI_CONNECTIONS_MAX, UAPI_LINES_MAX};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Mutex;
use tokio::task::AbortHandle;
use zeroize::Zeroizing;

use super::line::{self, Line};
use super::lines::{Lines, Read};
use super::{Refusal, Refusals};

/// A client that says nothing for so long is let go.
const IDLE_TIMEOUT: Duration = Duration::from_secs(120);

/// How long a program that starts may take to answer; it takes milliseconds.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(20);

/// Pause after a failed accept (no file descriptors left), so that it does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// Who answers. Called off the reactor: may wait for the data plane.
pub trait Handler: Send + Sync + 'static {
    /// Everything but `errno`, each line with its end.
    fn get(&self) -> Result<Zeroizing<String>, Refusal>;

    /// Takes all lines or changes nothing. Not called where [`Self::is_writable`] is false.
    fn set(&self, lines: Vec<Line>) -> Result<(), Refusal>;

    fn is_writable(&self) -> bool;
}

/// Where the socket of an interface is.
pub fn path(dir: &Path, interface: &str) -> PathBuf {
    dir.join(format!("{interface}.sock"))
}

/// Binds the socket of `interface`. One a dead program left is replaced; one that somebody answers at is not.
pub fn listen(dir: &Path, interface: &str) -> anyhow::Result<std::os::unix::net::UnixListener> {
    let socket = path(dir, interface);
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .with_context(|| format!("create directory {}", dir.display()))?;
    match std::fs::symlink_metadata(&socket) {
        Ok(found) => {
            ensure!(
                found.file_type().is_socket(),
                "{} is there and is no socket: remove it",
                socket.display()
            );
            ensure!(
                std::os::unix::net::UnixStream::connect(&socket).is_err(),
                "another program answers at {}: stop it first",
                socket.display()
            );
            remove(&socket)?;
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error).with_context(|| format!("look at {}", socket.display())),
    }
    appear(&socket)
}

/// Listens at `socket`, which is not there. `wg` removes a socket that refuses it, and a bound one does until somebody listens: it
/// gets its name when it is ready.
fn appear(socket: &Path) -> anyhow::Result<std::os::unix::net::UnixListener> {
    // Ours alone: another program may begin at the same time. One is there only where we had this number before.
    let aside = socket.with_extension(format!("{}.new", std::process::id()));
    remove(&aside)?;
    let listener = std::os::unix::net::UnixListener::bind(&aside)
        .with_context(|| format!("listen on {}", aside.display()))?;
    std::fs::set_permissions(&aside, std::fs::Permissions::from_mode(0o600))
        .with_context(|| format!("set {} to mode 0600", aside.display()))?;
    // Not renamed: that would take the place of another program's that begins at the same time.
    let linked = std::fs::hard_link(&aside, socket);
    remove(&aside)?;
    linked.with_context(|| format!("listen on {}", socket.display()))?;
    Ok(listener)
}

/// Removes a file, if it is there still.
fn remove(path: &Path) -> anyhow::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Waits until whoever serves `socket` answers; an error when it goes away, or says nothing for [`ANSWER_TIMEOUT`].
pub fn wait_for_answer(socket: &Path) -> io::Result<()> {
    use std::io::{Read as _, Write as _};
    let mut stream = std::os::unix::net::UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(ANSWER_TIMEOUT))?;
    stream.write_all(b"get=1\n\n")?;
    // A key may be among it where somebody was faster than this question.
    let mut byte = Zeroizing::new([0]);
    stream.read_exact(&mut *byte)
}

/// Serves until dropped. Whoever asks is heard: where too many have come, the one who came first has to go.
pub async fn serve(listener: UnixListener, service: Service) {
    let mut conversations = VecDeque::new();
    loop {
        match listener.accept().await {
            // The mode of the socket says the same; between binding and setting it, it does not.
            Ok((stream, _)) if is_trusted(&stream) => {
                make_room(&mut conversations);
                let conversation = converse(stream, service.clone(), Manner::Guest);
                let conversation = tokio::spawn(conversation);
                conversations.push_back(conversation.abort_handle());
            }
            Ok(_) => tracing::warn!("turned away from the configuration socket: only root may ask"),
            Err(error) => {
                tracing::warn!(%error, "configuration socket: accept failed");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Holds one conversation, which whoever started us has begun, until its other end is closed.
pub async fn serve_one(stream: UnixStream, service: Service) {
    converse(stream, service, Manner::Only).await;
}

/// Who answers, one request at a time over all connections.
#[derive(Clone)]
pub struct Service {
    handler: Arc<dyn Handler>,
    turn: Arc<Mutex<()>>,
    refusals: Arc<Refusals>,
}

impl Service {
    /// Counts in `refusals` what it does not do.
    pub fn new(handler: impl Handler, refusals: Arc<Refusals>) -> Self {
        Self { handler: Arc::new(handler), turn: Arc::default(), refusals }
    }
}

/// How a client is treated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Manner {
    /// Is let go when it is silent, and without a word when it talks nonsense: it can come again.
    Guest,
    /// Nobody else can come: is waited for, and heard whatever it said before.
    Only,
}

impl Manner {
    /// `None`: the client took too long.
    async fn wait<T>(self, work: impl Future<Output = T>) -> Option<T> {
        match self {
            Self::Guest => tokio::time::timeout(IDLE_TIMEOUT, work).await.ok(),
            Self::Only => Some(work.await),
        }
    }
}

fn make_room(conversations: &mut VecDeque<AbortHandle>) {
    conversations.retain(|conversation| !conversation.is_finished());
    if conversations.len() >= UAPI_CONNECTIONS_MAX
        && let Some(oldest) = conversations.pop_front()
    {
        tracing::warn!("too many connections to the configuration socket: the oldest is closed");
        oldest.abort();
    }
}

fn is_trusted(stream: &UnixStream) -> bool {
    let own = rustix::process::geteuid().as_raw();
    stream.peer_cred().is_ok_and(|peer| peer.uid() == 0 || peer.uid() == own)
}

async fn converse(mut stream: UnixStream, service: Service, manner: Manner) {
    let (reader, mut writer) = stream.split();
    let mut said = Lines::new(reader);
    let mut told = false;
    loop {
        let asked = manner.wait(request(&mut said, service.handler.is_writable()));
        let Some(Ok(asked)) = asked.await else { return };
        let ends = matches!(asked, Request::Nonsense) && manner == Manner::Guest;
        let goes_on = matches!(asked, Request::RefusedSet(..));
        let (answered, key) = match asked {
            Request::End => return,
            Request::Nonsense => (Err(Refusal::Protocol), None),
            Request::Refused(refusal) => (Err(refusal), None),
            Request::RefusedSet(refusal, key) => (Err(refusal), key),
            Request::Get => (off_reactor(&service, |handler| handler.get()).await, None),
            Request::Set(lines) => {
                let set = off_reactor(&service, |handler| handler.set(lines)).await;
                (set.map(|()| Zeroizing::new(String::new())), None)
            }
        };
        if let Err(refusal) = &answered {
            service.refusals.count(*refusal);
            if !std::mem::replace(&mut told, true) {
                tracing::warn!(key, %refusal, "a request to the configuration socket was refused; others of this client are counted");
            }
        }
        if ends {
            return;
        }
        let sent = manner.wait(answer(&mut writer, answered));
        if !matches!(sent.await, Some(Ok(()))) {
            return;
        }
        if goes_on {
            let skipped = manner.wait(skip_request(&mut said));
            if !matches!(skipped.await, Some(Ok(()))) {
                return;
            }
        }
    }
}

async fn off_reactor<T: Send + 'static>(
    service: &Service,
    work: impl FnOnce(&dyn Handler) -> Result<T, Refusal> + Send + 'static,
) -> Result<T, Refusal> {
    let handler = Arc::clone(&service.handler);
    let _turn = service.turn.lock().await;
    let done = tokio::task::spawn_blocking(move || work(&*handler));
    done.await.unwrap_or(Err(Refusal::Unknown))
}

async fn answer(
    writer: &mut (impl AsyncWrite + Unpin),
    answered: Result<Zeroizing<String>, Refusal>,
) -> io::Result<()> {
    let errno = match answered {
        Ok(lines) => {
            writer.write_all(lines.as_bytes()).await?;
            0
        }
        Err(refusal) => refusal.errno(),
    };
    writer.write_all(format!("errno={errno}\n\n").as_bytes()).await?;
    writer.flush().await
}

/// What a client wants.
#[derive(Debug)]
pub(super) enum Request {
    Get,
    Set(Vec<Line>),
    Refused(Refusal),
    /// For the line with this key, if it has one that there is. It may have more lines, which count for nothing
    /// ([`skip_request`]).
    RefusedSet(Refusal, Option<&'static str>),
    /// No request at all: what follows cannot be told apart.
    Nonsense,
    End,
}

/// Reads one request, to its blank line or the first line that is refused: that is answered at once, as a client may wait
/// for the answer before it says more.
pub(super) async fn request(
    said: &mut Lines<impl AsyncRead + Unpin>,
    writable: bool,
) -> io::Result<Request> {
    match said.next().await? {
        Read::End => return Ok(Request::End),
        Read::Line(b"get=1") => {}
        Read::Line(b"set=1") => return read_set(said, writable).await,
        Read::Line(_) | Read::TooLong | Read::Cut => return Ok(Request::Nonsense),
    }
    Ok(match said.next().await? {
        Read::End => Request::End,
        Read::Line([]) => Request::Get,
        _ => Request::Refused(Refusal::Invalid),
    })
}

async fn read_set(said: &mut Lines<impl AsyncRead + Unpin>, writable: bool) -> io::Result<Request> {
    if !writable {
        return Ok(Request::RefusedSet(Refusal::NotPermitted, None));
    }
    let mut lines = Vec::new();
    let mut in_peer = false;
    loop {
        let read = match said.next().await? {
            Read::End | Read::Line([]) => return Ok(Request::Set(lines)),
            Read::TooLong => Err((Refusal::TooLong, None)),
            Read::Cut => Err((Refusal::Protocol, None)),
            Read::Line(_) if lines.len() >= UAPI_LINES_MAX => Err((Refusal::TooLong, None)),
            Read::Line(text) => line::parse(text, in_peer, &zone)
                .map_err(|refusal| (refusal, line::known_key(text))),
        };
        match read {
            Ok(line) => {
                in_peer |= matches!(line, Line::PublicKey(_));
                lines.push(line);
            }
            Err((refusal, key)) => return Ok(Request::RefusedSet(refusal, key)),
        }
    }
}

/// Reads what is left of a request, so that a client that writes before it reads is not cut off.
pub(super) async fn skip_request(said: &mut Lines<impl AsyncRead + Unpin>) -> io::Result<()> {
    while !matches!(said.next().await?, Read::End | Read::Line([])) {}
    Ok(())
}

/// The index of the interface an address is behind.
fn zone(name: &str) -> Option<u32> {
    netcfg::link::get(name).ok().flatten().map(|link| link.index)
}
