//! Errors as the runtime reads them (CNI SPEC.md 1.1.0, section "Error").

use std::fmt;

use serde::Serialize;

use crate::spec::version::Version;

/// Codes below 100 are the specification's (8 is the reference plugin library's), from 100 on ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    IncompatibleVersion,
    /// A field asks for something we do not do; the message has its key and value.
    UnsupportedField,
    UnknownContainer,
    InvalidEnvironment,
    Io,
    Decoding,
    InvalidConfig,
    InvalidNetns,
    TryAgainLater,
    /// STATUS: ADD would fail.
    NotAvailable,
    /// STATUS: ADD would fail, and pods that are there reach less than they should.
    Limited,
    /// A kernel object could not be made, read or removed.
    Kernel,
    /// Every address of the node's pod CIDRs is taken.
    RangeExhausted,
    /// The interface is there already.
    InterfaceExists,
    /// CHECK found something else than what ADD made.
    CheckFailed,
    /// GC could not free everything it should.
    Incomplete,
}

impl Code {
    pub const fn number(self) -> u32 {
        match self {
            Self::IncompatibleVersion => 1,
            Self::UnsupportedField => 2,
            Self::UnknownContainer => 3,
            Self::InvalidEnvironment => 4,
            Self::Io => 5,
            Self::Decoding => 6,
            Self::InvalidConfig => 7,
            Self::InvalidNetns => 8,
            Self::TryAgainLater => 11,
            Self::NotAvailable => 50,
            Self::Limited => 51,
            Self::Kernel => 100,
            Self::RangeExhausted => 101,
            Self::InterfaceExists => 102,
            Self::CheckFailed => 103,
            Self::Incomplete => 104,
        }
    }
}

/// What went wrong: `message` for the eye, `details` for the operator who looks closer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CniError {
    pub code: Code,
    pub message: String,
    pub details: String,
}

impl CniError {
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), details: String::new() }
    }

    pub fn with_details(mut self, details: impl Into<String>) -> Self {
        self.details = details.into();
        self
    }

    /// An error with its chain of causes in `details`.
    pub fn caused(code: Code, message: impl Into<String>, cause: &anyhow::Error) -> Self {
        Self::new(code, message).with_details(format!("{cause:#}"))
    }

    pub fn to_json(&self, version: Version) -> Vec<u8> {
        #[derive(Serialize)]
        #[serde(rename_all = "camelCase")]
        struct Wire<'a> {
            cni_version: &'a str,
            code: u32,
            msg: &'a str,
            #[serde(skip_serializing_if = "str::is_empty")]
            details: &'a str,
        }
        let wire = Wire {
            cni_version: version.as_str(),
            code: self.code.number(),
            msg: &self.message,
            details: &self.details,
        };
        crate::spec::result::to_json(&wire)
    }
}

impl fmt::Display for CniError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (code {})", self.message, self.code.number())?;
        if self.details.is_empty() { Ok(()) } else { write!(f, ": {}", self.details) }
    }
}

impl std::error::Error for CniError {}
