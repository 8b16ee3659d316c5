//! Whom a benchmark measures: us, and the programs of others.

/// One of those that are measured in turn.
pub(super) trait Subject: Copy + Ord + 'static {
    /// Ours first.
    const ALL: &'static [Self];
    /// What is said of one whose program the script could not bring.
    const ABSENT: &'static str;

    fn name(self) -> &'static str;

    /// Whether a script has to bring its program.
    fn is_brought(self) -> bool;

    fn named(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|subject| subject.name() == name)
    }

    fn is_ours(self) -> bool {
        Self::ALL.first() == Some(&self)
    }
}
