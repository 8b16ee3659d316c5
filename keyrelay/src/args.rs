//! The command line.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Parser, Subcommand};
use mesh_types::defaults::KEYRELAY_PORT;
use mesh_types::key::PublicKey;

/// Tells nodes behind NAT what they look like from outside.
#[derive(Debug, Parser)]
#[command(name = "keyrelay", version)]
pub(crate) struct Args {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Serve the members of a mesh.
    Run(Run),
    /// Ask a relay for the address it sees us at.
    Whoami(Whoami),
}

#[derive(Debug, clap::Args)]
pub(crate) struct Run {
    /// Private key file; made on the first start, readable by its owner only.
    #[arg(
        long,
        env = "KEYRELAY_PRIVATE_KEY_FILE",
        default_value = "/var/lib/keyrelay/private-key"
    )]
    pub(crate) private_key_file: PathBuf,

    /// UDP address to listen on, instead of every address.
    #[arg(long, env = "KEYRELAY_LISTEN")]
    pub(crate) listen: Option<SocketAddr>,

    /// UDP port to listen on at every address.
    #[arg(long, env = "KEYRELAY_PORT", default_value_t = KEYRELAY_PORT, conflicts_with = "listen")]
    pub(crate) port: u16,

    /// Public key of a member; may be given several times.
    #[arg(long = "allow-key", value_name = "KEY")]
    pub(crate) allow_keys: Vec<PublicKey>,

    /// File of members' public keys, one per line, `#` begins a comment.
    #[arg(long, env = "KEYRELAY_KEYS_FILE", value_name = "FILE")]
    pub(crate) keys_file: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Whoami {
    /// Host name or address of the relay, and port.
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) relay: String,

    /// Public key of the relay.
    #[arg(long, value_name = "KEY")]
    pub(crate) relay_key: PublicKey,

    /// File with our private key, as `wg genkey` prints it.
    #[arg(long, value_name = "FILE")]
    pub(crate) key_file: PathBuf,

    /// How long to wait for an answer.
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    pub(crate) timeout_s: u64,
}
