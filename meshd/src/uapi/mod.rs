//! The cross-platform configuration protocol of WireGuard (<https://www.wireguard.com/xplatform/>), as `wg` speaks it.
//!
//! ```text
//!  /var/run/wireguard/IFNAME.sock                                pure
//!  get=1 ─────────> [server] ─────────────────────────────> [device] print ──> lines, errno=0
//!  set=1, lines ──> [server] ──> [line] parse ──> all of them ──> apply ─────> errno=0 or why not
//! ```
//! A request is applied whole or not at all: one line that makes no sense, and nothing has changed. Error numbers are those
//! of the reference (`device/uapi.go` and `ipc/uapi_unix.go` of wireguard-go), negative as the kernel's.

pub mod device;
pub mod line;
mod lines;
mod refusal;
mod refusals;
pub mod server;

#[cfg(test)]
mod tests;

pub use refusal::Refusal;
pub use refusals::Refusals;
