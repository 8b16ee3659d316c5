//! The roster file, watched.
