//! The CNI contract as data: environment, configuration, result, error (CNI SPEC.md 1.1.0).
//!
//! ```text
//! environment ─> env::Request ─┐
//!                              ├─> command ─> result::CniResult ─> stdout
//! stdin ──────> config::Config ┘         └──> error::CniError  ─> stdout, exit status 1
//! ```
//!
//! Nothing here does I/O. Unknown fields are ignored, as the specification asks; what is ours is checked strictly.

pub mod config;
pub mod env;
pub mod error;
pub mod result;
pub mod version;
