//! Versions of the specification we speak.

use std::fmt;

/// A supported version; ordered as the specification's versions are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Version {
    V0_3_1,
    V0_4_0,
    V1_0_0,
    V1_1_0,
}

impl Version {
    pub const ALL: [Self; 4] = [Self::V0_3_1, Self::V0_4_0, Self::V1_0_0, Self::V1_1_0];
    pub const NEWEST: Self = Self::V1_1_0;

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::V0_3_1 => "0.3.1",
            Self::V0_4_0 => "0.4.0",
            Self::V1_0_0 => "1.0.0",
            Self::V1_1_0 => "1.1.0",
        }
    }

    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|version| version.as_str() == text)
    }

    /// Whether a text is a version at all: three numbers, as semantic versions begin.
    pub fn is_one(text: &str) -> bool {
        let core = text.split(['-', '+']).next().unwrap_or_default();
        let mut parts = core.split('.');
        let numbers = parts.by_ref().take(3).filter(|part| part.parse::<u32>().is_ok()).count();
        numbers == 3 && parts.next().is_none()
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_parse_back_and_are_ordered() {
        for pair in Version::ALL.windows(2) {
            assert!(pair[0] < pair[1]);
        }
        for version in Version::ALL {
            assert_eq!(Version::parse(version.as_str()), Some(version));
        }
        for other in ["", "0.2.0", "0.3.0", "1.1", "1.2.0", "v1.0.0", " 1.0.0"] {
            assert_eq!(Version::parse(other), None, "{other}");
        }
        for other in ["0.2.0", "9.8.7", "10.0.0", "1.1.0-rc1"] {
            assert!(Version::is_one(other), "{other}");
        }
        for other in ["", "1.1", "1.1.0.0", "v1.0.0", "adsfsadf", "1..0", " 1.0.0"] {
            assert!(!Version::is_one(other), "{other}");
        }
    }
}
