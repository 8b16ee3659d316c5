//! Selectors of lists and watches: which objects they are about.
//!
//! Labels as in the Kubernetes reference ("Labels and Selectors"): `a=b`, `a==b`, `a!=b`, `a in (b,c)`, `a notin (b)`,
//! `a`, `!a`. Fields: `metadata.name` with `=`, `==` and `!=`. Others are refused, never ignored.

use serde_json::Value;

use super::store::{StoreError, text};

/// All requirements have to hold.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Selector {
    names: Vec<(bool, String)>,
    labels: Vec<Requirement>,
}

/// `wanted`: whether the label's value must be one of `values`, or must not; no values stand for any value.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Requirement {
    key: String,
    wanted: bool,
    values: Option<Vec<String>>,
}

impl Selector {
    pub fn parse(fields: Option<&str>, labels: Option<&str>) -> Result<Self, StoreError> {
        let names = terms(fields).map(|term| match equality(term) {
            Some(("metadata.name", wanted, name)) => Ok((wanted, name.to_owned())),
            _ => Err(StoreError::BadRequest(format!("field selector {term:?} not supported"))),
        });
        let labels = terms(labels).map(|term| {
            Requirement::parse(term).ok_or_else(|| {
                StoreError::BadRequest(format!("unable to parse requirement: {term:?}"))
            })
        });
        Ok(Self {
            names: names.collect::<Result<_, _>>()?,
            labels: labels.collect::<Result<_, _>>()?,
        })
    }

    pub fn matches(&self, object: &Value) -> bool {
        let labels = object.pointer("/metadata/labels");
        let name = text(object, "/metadata/name");
        self.names.iter().all(|(wanted, named)| (name == Some(named.as_str())) == *wanted)
            && self.labels.iter().all(|requirement| {
                let value = labels.and_then(|labels| labels.get(&requirement.key));
                requirement.holds(value.and_then(Value::as_str))
            })
    }
}

impl Requirement {
    fn parse(term: &str) -> Option<Self> {
        let new = |key: &str, wanted: bool, values: Option<Vec<String>>| {
            let good = |c: char| c.is_ascii_alphanumeric() || "-_./".contains(c);
            let values_good = values.iter().flatten().all(|value| value.chars().all(good));
            (!key.is_empty() && key.chars().all(good) && values_good).then(|| Self {
                key: key.to_owned(),
                wanted,
                values,
            })
        };
        if let Some((key, wanted, value)) = equality(term) {
            return new(key, wanted, Some(vec![value.to_owned()]));
        }
        if let Some((left, list)) = term.split_once('(') {
            let list = list.strip_suffix(')')?;
            let values = list.split(',').map(|value| value.trim().to_owned()).collect();
            let mut words = left.split_whitespace();
            let (key, how) = (words.next()?, words.next()?);
            let wanted = match how {
                "in" => true,
                "notin" => false,
                _ => return None,
            };
            return words.next().is_none().then(|| new(key, wanted, Some(values)))?;
        }
        match term.strip_prefix('!') {
            Some(key) => new(key.trim(), false, None),
            None => new(term, true, None),
        }
    }

    /// An object without the label fulfils every requirement of what it must not be.
    fn holds(&self, value: Option<&str>) -> bool {
        let found = value.is_some_and(|value| {
            self.values.as_ref().is_none_or(|values| values.iter().any(|one| one == value))
        });
        found == self.wanted
    }
}

/// `key=value`, `key==value` or `key!=value`.
fn equality(term: &str) -> Option<(&str, bool, &str)> {
    let (key, value) = term.split_once('=')?;
    let value = value.strip_prefix('=').unwrap_or(value);
    let (key, wanted) = match key.strip_suffix('!') {
        Some(key) => (key, false),
        None => (key, true),
    };
    Some((key.trim(), wanted, value.trim()))
}

/// Splits at the commas outside brackets.
fn terms(text: Option<&str>) -> impl Iterator<Item = &str> {
    let mut inside = false;
    let split = move |c: char| {
        match c {
            '(' => inside = true,
            ')' => inside = false,
            _ => {}
        }
        c == ',' && !inside
    };
    text.unwrap_or_default().split(split).map(str::trim).filter(|term| !term.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn labels(selector: &str) -> Selector {
        Selector::parse(None, Some(selector)).expect(selector)
    }

    #[test]
    fn labels_are_compared_as_the_reference_says() {
        let node = json!({"metadata": {"name": "n", "labels": {"site": "a", "x.io/y": ""}}});
        for yes in [
            "site=a",
            "site==a",
            "site!=b",
            "site in (b, a)",
            "site notin (b,c)",
            "site",
            "!other",
            "other!=a",
            "other notin (a)",
            "x.io/y=",
            "x.io/y",
            "site in (a),!other",
            "",
        ] {
            assert!(labels(yes).matches(&node), "{yes}");
        }
        for no in
            ["site=b", "site!=a", "site notin (a)", "!site", "other", "other in (a)", "site,site=b"]
        {
            assert!(!labels(no).matches(&node), "{no}");
        }
        for bad in ["site in a", "site near (a)", "a b", "(a)", "!", "=a", "site in (a"] {
            assert!(Selector::parse(None, Some(bad)).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_field_that_is_not_served_is_refused() {
        let node = json!({"metadata": {"name": "n"}});
        let named = |field: &str| Selector::parse(Some(field), None);
        assert!(named("metadata.name=n").expect("known").matches(&node));
        assert!(!named("metadata.name!=n").expect("known").matches(&node));
        assert!(named("spec.x=1").is_err());
    }
}
