//! The part of the Containerfile format that our image needs. Whatever else a file holds is refused by line and
//! name: an instruction that was skipped would make another image than a container builder makes of the same file.

use std::collections::BTreeMap;

use anyhow::{Context as _, bail, ensure};

/// One instruction, with the variables in it replaced.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// As it stands in the file, for the image's history.
    pub text: String,
    pub action: Action,
}

/// What an instruction does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Says what is known when the image is made; leaves nothing in it.
    Nothing,
    Copy {
        sources: Vec<String>,
        target: String,
        mode: u32,
    },
    Label(Vec<(String, String)>),
    Env(Vec<(String, String)>),
    User(String),
    Entrypoint(Vec<String>),
}

/// Reads a Containerfile. `arguments` are the values of its `ARG`s; one that no `ARG` names is refused.
pub fn parse(text: &str, arguments: &BTreeMap<String, String>) -> anyhow::Result<Vec<Step>> {
    let mut reader = Reader { given: arguments, known: BTreeMap::new(), begun: false };
    let mut steps = Vec::new();
    for (number, line) in logical_lines(text)? {
        let action = reader.step(&line).with_context(|| format!("line {number}: {line}"))?;
        steps.push(Step { text: line, action });
    }
    ensure!(reader.begun, "there is no FROM");
    if let Some(name) = arguments.keys().find(|name| !reader.known.contains_key(*name)) {
        bail!("no ARG is named {name}");
    }
    Ok(steps)
}

/// Lines with their number, without comments and empty ones, continued ones joined.
fn logical_lines(text: &str) -> anyhow::Result<Vec<(usize, String)>> {
    let mut lines = Vec::new();
    let mut open: Option<(usize, String)> = None;
    for (at, line) in text.lines().enumerate() {
        let line = line.trim();
        if let Some(comment) = line.strip_prefix('#') {
            let name = comment.split('=').next().unwrap_or("").trim();
            let directive = matches!(name, "syntax" | "escape" | "check");
            ensure!(!directive, "line {}: the directive {name} is not known here", at + 1);
            continue;
        }
        if line.is_empty() {
            continue;
        }
        let (number, mut joined) = open.take().unwrap_or((at + 1, String::new()));
        match line.strip_suffix('\\') {
            Some(part) => {
                joined.push_str(part);
                open = Some((number, joined));
            }
            None => {
                joined.push_str(line);
                lines.push((number, joined));
            }
        }
    }
    ensure!(open.is_none(), "the last line ends in a backslash");
    Ok(lines)
}

struct Reader<'a> {
    given: &'a BTreeMap<String, String>,
    known: BTreeMap<String, String>,
    begun: bool,
}

impl Reader<'_> {
    fn step(&mut self, line: &str) -> anyhow::Result<Action> {
        let (name, rest) = line.split_once(char::is_whitespace).context("nothing follows")?;
        let rest = rest.trim();
        if name == "FROM" {
            ensure!(!self.begun, "a second FROM is not known here");
            ensure!(rest == "scratch", "only FROM scratch is known here");
            self.begun = true;
            return Ok(Action::Nothing);
        }
        // An ARG before FROM is another thing than one after it.
        ensure!(self.begun, "FROM comes first");
        match name {
            "ARG" => self.argument(rest),
            "COPY" => self.copy(rest),
            "LABEL" => Ok(Action::Label(self.pairs(rest)?)),
            "ENV" => Ok(Action::Env(self.pairs(rest)?)),
            "USER" => Ok(Action::User(self.one_word(rest)?)),
            "ENTRYPOINT" => Ok(Action::Entrypoint(
                serde_json::from_str(rest).context("a JSON list of strings is needed")?,
            )),
            _ => bail!("the instruction {name} is not known here"),
        }
    }

    fn argument(&mut self, rest: &str) -> anyhow::Result<Action> {
        let (name, default) = match rest.split_once('=') {
            Some((name, value)) => (name, Some(self.one_word(value)?)),
            None => (rest, None),
        };
        ensure!(is_name(name), "{name:?} is no name of a variable");
        let value = self.given.get(name).cloned().or(default);
        let value = value.with_context(|| format!("no value was given for {name}"))?;
        self.known.insert(name.to_owned(), value);
        Ok(Action::Nothing)
    }

    fn copy(&self, rest: &str) -> anyhow::Result<Action> {
        let mut words = self.words(rest)?;
        // Without it the image would have the modes of the machine that built it.
        let octal = words.first().and_then(|word| word.strip_prefix("--chmod="));
        let mode = octal.context("COPY needs --chmod=MODE first, and knows nothing else here")?;
        let mode = u32::from_str_radix(mode, 8).ok().filter(|mode| *mode <= 0o7777);
        let mode = mode.context("--chmod needs an octal mode, as in 0755")?;
        words.remove(0);
        ensure!(!words.iter().any(|word| word.starts_with("--")), "COPY knows --chmod alone here");
        ensure!(
            !words.iter().any(|word| word.contains(['*', '?', '['])),
            "patterns are not known here"
        );
        let target = words.pop().filter(|_| !words.is_empty());
        let target = target.context("COPY needs sources and a target")?;
        ensure!(target.starts_with('/'), "the target has to be a whole path");
        ensure!(
            words.len() == 1 || target.ends_with('/'),
            "the target of several sources ends in a slash"
        );
        for path in words.iter().chain([&target]) {
            ensure!(!path.split('/').any(|part| part == ".."), "{path}: no .. in a path");
        }
        Ok(Action::Copy { sources: words, target, mode })
    }

    fn pairs(&self, rest: &str) -> anyhow::Result<Vec<(String, String)>> {
        let pair = |word: String| {
            let (name, value) = word.split_once('=').context("KEY=VALUE is needed")?;
            ensure!(!name.is_empty(), "a name is missing before =");
            Ok((name.to_owned(), value.to_owned()))
        };
        self.words(rest)?.into_iter().map(pair).collect()
    }

    fn one_word(&self, rest: &str) -> anyhow::Result<String> {
        let mut words = self.words(rest)?;
        let word = words.pop().filter(|_| words.is_empty());
        word.context("exactly one word is needed")
    }

    /// Words of a line: split at white space outside of double quotes, variables replaced.
    fn words(&self, line: &str) -> anyhow::Result<Vec<String>> {
        let (mut words, mut word, mut quoted) = (Vec::new(), None::<String>, false);
        let mut rest = line;
        while let Some(letter) = rest.chars().next() {
            rest = rest.get(letter.len_utf8()..).unwrap_or("");
            match letter {
                '"' => {
                    quoted = !quoted;
                    word.get_or_insert_default();
                }
                '\'' | '\\' | '`' => bail!("{letter} is not known here: use double quotes"),
                '$' => {
                    let (value, after) = self.variable(rest)?;
                    word.get_or_insert_default().push_str(value);
                    rest = after;
                }
                _ if letter.is_whitespace() && !quoted => words.extend(word.take()),
                _ => word.get_or_insert_default().push(letter),
            }
        }
        ensure!(!quoted, "a double quote is not closed");
        words.extend(word);
        Ok(words)
    }

    /// The value of `{NAME}` at the beginning of a text, and what follows it.
    fn variable<'t>(&self, text: &'t str) -> anyhow::Result<(&str, &'t str)> {
        let inner = text.strip_prefix('{').and_then(|text| text.split_once('}'));
        let (name, after) = inner.context("a variable is written ${NAME} here")?;
        ensure!(is_name(name), "${{{name}}}: only a plain name is known here");
        let value = self.known.get(name);
        Ok((value.with_context(|| format!("no ARG before this line is named {name}"))?, after))
    }
}

fn is_name(text: &str) -> bool {
    let fine = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    !text.is_empty() && text.bytes().all(fine)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> anyhow::Result<Vec<Action>> {
        let arguments = BTreeMap::from([("ARCH".to_owned(), "arm64".to_owned())]);
        let steps = parse(&format!("FROM scratch\nARG ARCH\n{text}"), &arguments)?;
        Ok(steps.into_iter().skip(2).map(|step| step.action).collect())
    }

    #[test]
    fn what_our_image_needs_is_read() {
        let actions = read(
            "# a comment = none\n\nCOPY --chmod=0755 ${ARCH}/a \\\n  # between\n  \"b c\" /usr/bin/\n\
             LABEL one=1 two=\"a b ${ARCH}\"\nENV PATH=/a:/b\nUSER 0:0\nENTRYPOINT [\"/a\", \"${ARCH}\"]",
        )
        .unwrap();
        let text = |text: &str| text.to_owned();
        let copy = Action::Copy {
            sources: vec![text("arm64/a"), text("b c")],
            target: text("/usr/bin/"),
            mode: 0o755,
        };
        let label = Action::Label(vec![(text("one"), text("1")), (text("two"), text("a b arm64"))]);
        let env = Action::Env(vec![(text("PATH"), text("/a:/b"))]);
        // The exec form replaces no variables.
        let entrypoint = Action::Entrypoint(vec![text("/a"), text("${ARCH}")]);
        assert_eq!(actions, [copy, label, env, Action::User(text("0:0")), entrypoint]);
    }

    #[test]
    fn whatever_is_not_known_is_refused_by_line() {
        for (line, word) in [
            ("RUN true", "RUN is not known"),
            ("ADD a /", "ADD is not known"),
            ("CMD [\"a\"]", "CMD is not known"),
            ("run true", "run is not known"),
            ("FROM scratch", "second FROM"),
            ("COPY a /", "--chmod"),
            ("COPY --chmod=0755 --chown=1 a /", "--chmod alone"),
            ("COPY --chmod=u+x a /", "octal"),
            ("COPY --chmod=17777 a /", "octal"),
            ("COPY --chmod=0755 a", "sources and a target"),
            ("COPY --chmod=0755 a b", "whole path"),
            ("COPY --chmod=0755 a b /c", "ends in a slash"),
            ("COPY --chmod=0755 ../a /c", "no .."),
            ("COPY --chmod=0755 a* /c/", "patterns"),
            ("COPY --chmod=0755 $ARCH /c", "${NAME}"),
            ("COPY --chmod=0755 ${ARCH:-x} /c", "plain name"),
            ("COPY --chmod=0755 ${OTHER} /c", "named OTHER"),
            ("LABEL a='b'", "double quotes"),
            ("LABEL a=\"b", "not closed"),
            ("LABEL a", "KEY=VALUE"),
            ("ENV =a", "name is missing"),
            ("USER", "nothing follows"),
            ("USER a b", "exactly one word"),
            ("ENTRYPOINT /usr/bin/meshd run", "JSON list"),
            ("ARG A-B=1", "no name"),
            ("ARG NEVER_GIVEN", "no value was given for NEVER_GIVEN"),
        ] {
            let error = format!("{:#}", read(line).expect_err(line));
            assert!(error.contains(word) && error.contains("line 3"), "{line}: {error}");
        }
        for (text, word) in [
            ("", "no FROM"),
            ("# nothing\n", "no FROM"),
            ("ARG A=1\nFROM scratch", "FROM comes first"),
            ("FROM debian:13", "only FROM scratch"),
            ("FROM scratch AS one", "only FROM scratch"),
            ("# syntax=docker/dockerfile:1\nFROM scratch", "directive syntax"),
            ("# escape=`\nFROM scratch", "directive escape"),
            ("FROM scratch\nUSER 0 \\", "ends in a backslash"),
        ] {
            let error = format!("{:#}", parse(text, &BTreeMap::new()).expect_err(text));
            assert!(error.contains(word), "{text}: {error}");
        }
    }

    #[test]
    fn an_argument_that_no_line_takes_is_refused() {
        let arguments = BTreeMap::from([("TYPO".to_owned(), String::new())]);
        let error = parse("FROM scratch", &arguments).expect_err("a name nobody knows");
        assert!(error.to_string().contains("TYPO"));
    }

    #[test]
    fn a_value_given_wins_over_the_default() {
        let values = |given: &[(&str, &str)]| {
            let given = given
                .iter()
                .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
                .collect();
            let steps = parse("FROM scratch\nARG A=\"x y\"\nUSER ${A}", &given).unwrap();
            steps.last().unwrap().action.clone()
        };
        assert_eq!(values(&[]), Action::User("x y".to_owned()));
        assert_eq!(values(&[("A", "z")]), Action::User("z".to_owned()));
    }
}
