//! Conversations with a server that has no device behind it.

use std::io::Write;
use std::sync::{Mutex, PoisonError};

use tokio::io::AsyncReadExt as _;

use super::*;

/// Takes everything, and is one that listens at a port.
struct Patient;

impl Handler for Patient {
    fn get(&self) -> Result<Zeroizing<String>, Refusal> {
        Ok(Zeroizing::new("listen_port=1\n".to_owned()))
    }

    fn set(&self, _: Vec<Line>) -> Result<(), Refusal> {
        Ok(())
    }

    fn is_writable(&self) -> bool {
        true
    }
}

fn counted(refusals: &Refusals) -> Vec<(String, u64)> {
    let counters = refusals.counters().into_iter().filter(|it| it.count > 0);
    counters.map(|it| (it.reason, it.count)).collect()
}

/// Says `words`, which want an answer as long as `expected`, and hears it.
async fn say(client: &mut UnixStream, words: &str, expected: &str) {
    client.write_all(words.as_bytes()).await.expect("written");
    let mut answer = vec![0; expected.len()];
    client.read_exact(&mut answer).await.expect("an answer");
    assert_eq!(String::from_utf8_lossy(&answer), expected, "{words}");
}

#[tokio::test(start_paused = true)]
async fn the_only_conversation_goes_on_until_its_other_end_is_closed() {
    let (near, mut far) = UnixStream::pair().expect("a pair");
    let refusals = Arc::default();
    let served = tokio::spawn(serve_one(near, Service::new(Patient, Arc::clone(&refusals))));
    say(&mut far, "get=2\n", "errno=-71\n\n").await;
    tokio::time::advance(IDLE_TIMEOUT * 2).await;
    say(&mut far, "get=1\n\n", "listen_port=1\nerrno=0\n\n").await;
    say(&mut far, "set=1\nfwmark=x\n\n", "errno=-22\n\n").await;
    say(&mut far, "set=1\nfwmark=1\n\n", "errno=0\n\n").await;
    assert_eq!(counted(&refusals), [("invalid".to_owned(), 1), ("no_line".to_owned(), 1)]);
    assert!(!served.is_finished());
    drop(far);
    served.await.expect("it ends");
}

#[tokio::test]
async fn who_begins_no_request_is_let_go_without_a_word_and_counted() {
    for words in ["get=2\n\nget=1\n\n", "\n", "get=1", "GET / HTTP/1.1\r\n\r\n"] {
        let (near, mut far) = UnixStream::pair().expect("a pair");
        let refusals = Arc::default();
        let service = Service::new(Patient, Arc::clone(&refusals));
        far.write_all(words.as_bytes()).await.expect("written");
        far.shutdown().await.expect("shut");
        converse(near, service, Manner::Guest).await;
        let mut answer = Vec::new();
        // What it did not read is lost with the connection.
        let _ = far.read_to_end(&mut answer).await;
        assert_eq!(answer, b"", "{words}");
        assert_eq!(counted(&refusals), [("no_line".to_owned(), 1)]);
    }
}

/// A log that can be read.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Write::write(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner), bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Log {
    fn take(&self) -> String {
        let bytes = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        String::from_utf8(bytes).expect("text")
    }
}

#[tokio::test]
async fn a_refused_request_is_told_once_by_its_key_and_never_by_its_value() {
    let log = Log::default();
    let writer = log.clone();
    let told = tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone());
    // Where there is one alone, a thread without it that comes by first has what is told here switched off for all.
    let _another = tracing::Dispatch::new(tracing_subscriber::fmt().with_writer(io::sink).finish());
    let _here = tracing::subscriber::set_default(told.finish());
    let refusals = Arc::default();
    for (first, named) in [
        ("preshared_key=c2VjcmV0", Some("key=\"preshared_key\"")),
        // A key in the wrong place, which is none of ours: it ends as Base64 does.
        ("c2VjcmV0c2VjcmV0c2VjcmU=", None),
        ("c2VjcmV0", None),
    ] {
        let (near, mut far) = UnixStream::pair().expect("a pair");
        let served = tokio::spawn(serve_one(near, Service::new(Patient, Arc::clone(&refusals))));
        let errno = if first.contains('=') { -22 } else { -71 };
        let request = format!("set=1\npublic_key={}\n{first}\n\n", "09".repeat(32));
        say(&mut far, &request, &format!("errno={errno}\n\n")).await;
        say(&mut far, "set=1\nfwmark=x\n\n", "errno=-22\n\n").await;
        drop(far);
        served.await.expect("it ends");
        let log = log.take();
        assert_eq!(log.matches("refused").count(), 1, "{log}");
        assert!(!log.contains("c2Vj") && named.is_none_or(|named| log.contains(named)), "{log}");
    }
    assert_eq!(counted(&refusals), [("invalid".to_owned(), 5), ("no_line".to_owned(), 1)]);
}
