//! Completion: scripts for shells, and answers for kubectl.
//!
//! `kubectl mesh <TAB>` makes kubectl run `kubectl_complete-mesh WORD...`, the last word being the one to complete, and reads
//! a candidate a line, a tab before its description, and a last line with a number (cobra's ShellCompDirective).

use std::ffi::OsStr;
use std::io::Write as _;
use std::path::Path;

use anyhow::Context;
use clap::{Arg, Command, CommandFactory, Parser};

use super::args::{AccessArgs, Args, CompletionArgs};

/// The name under which kubectl looks for completions of `kubectl mesh`.
pub const PROGRAM: &str = "kubectl_complete-mesh";

/// Cobra's "no file names either".
const NO_FILES: &str = ":4";

/// Whether this program was called to complete.
pub fn is_asked(argv0: Option<&OsStr>) -> bool {
    argv0.map(Path::new).and_then(Path::file_name) == Some(OsStr::new(PROGRAM))
}

/// `kubectl mesh completion SHELL`.
pub fn script(args: &CompletionArgs) -> anyhow::Result<()> {
    let mut text = Vec::new();
    clap_complete::generate(args.shell, &mut Args::command(), "kubectl-mesh", &mut text);
    std::io::stdout().lock().write_all(&text).context("print")
}

/// What `kubectl_complete-mesh` prints. `nodes` is asked only where a node's name belongs.
pub fn answer(words: &[String], nodes: impl FnOnce(&AccessArgs) -> Vec<String>) -> String {
    let mut text = String::new();
    let place = place(words);
    let candidates = match &place {
        Place::Flag(command) => flags(command),
        Place::Value(arg) => values(arg),
        Place::Subcommand(command) => subcommands(command),
        Place::Node { given } => {
            let names = nodes(&access(words)).into_iter().filter(|name| !given.contains(name));
            names.map(|name| (name, String::new())).collect()
        }
        Place::Nothing => Vec::new(),
    };
    let begun = words.last().map(String::as_str).unwrap_or_default();
    for (candidate, about) in candidates.into_iter().filter(|(it, _)| it.starts_with(begun)) {
        let about = if about.is_empty() { about } else { format!("\t{about}") };
        text.push_str(&format!("{candidate}{about}\n"));
    }
    format!("{text}{NO_FILES}\n")
}

/// What belongs where the last word is.
enum Place {
    Flag(Command),
    Value(Arg),
    Subcommand(Command),
    Node { given: Vec<String> },
    Nothing,
}

fn place(words: &[String]) -> Place {
    let mut root = Args::command();
    root.build();
    let (begun, before) = match words.split_last() {
        Some((last, before)) => (last.as_str(), before),
        None => ("", words),
    };
    let mut command = root;
    let mut given: Vec<String> = Vec::new();
    let mut words = before.iter();
    while let Some(word) = words.next() {
        if let Some(arg) =
            flag(&command, word).filter(|arg| takes_value(arg) && !word.contains('='))
        {
            if words.next().is_none() {
                return Place::Value(arg);
            }
        } else if let Some(sub) = command.find_subcommand(word).cloned() {
            command = sub;
        } else if !word.starts_with('-') {
            given.push(word.clone());
        }
    }
    if begun.starts_with('-') {
        return Place::Flag(command);
    }
    if command.get_subcommands().next().is_some() {
        return Place::Subcommand(command);
    }
    let positionals: Vec<&Arg> = command.get_positionals().collect();
    let many =
        positionals.last().filter(|arg| arg.get_num_args().is_some_and(|it| it.max_values() > 1));
    match positionals.get(given.len()).or(many) {
        Some(arg) if !arg.get_possible_values().is_empty() => Place::Value((*arg).clone()),
        Some(_) => Place::Node { given },
        None => Place::Nothing,
    }
}

fn flag(command: &Command, word: &str) -> Option<Arg> {
    let name = word.split('=').next().unwrap_or(word);
    let is = |arg: &&Arg| match name.strip_prefix("--") {
        Some(long) => arg.get_long() == Some(long),
        None => name
            .strip_prefix('-')
            .is_some_and(|short| arg.get_short().is_some_and(|it| short == it.to_string())),
    };
    command.get_arguments().find(is).cloned()
}

fn takes_value(arg: &Arg) -> bool {
    arg.get_action().takes_values()
}

fn flags(command: &Command) -> Vec<(String, String)> {
    let long = |arg: &Arg| Some((format!("--{}", arg.get_long()?), about(arg.get_help())));
    command.get_arguments().filter(|arg| !arg.is_hide_set()).filter_map(long).collect()
}

fn values(arg: &Arg) -> Vec<(String, String)> {
    let values = arg.get_possible_values();
    values.iter().map(|it| (it.get_name().to_owned(), about(it.get_help()))).collect()
}

fn subcommands(command: &Command) -> Vec<(String, String)> {
    let commands = command.get_subcommands().filter(|it| !it.is_hide_set());
    commands.map(|it| (it.get_name().to_owned(), about(it.get_about()))).collect()
}

fn about(text: Option<&clap::builder::StyledStr>) -> String {
    text.map(ToString::to_string).unwrap_or_default().lines().next().unwrap_or_default().to_owned()
}

/// The flags of access among the words, so that names come from the cluster that is meant.
fn access(words: &[String]) -> AccessArgs {
    #[derive(Parser)]
    #[command(no_binary_name = true, disable_help_flag = true)]
    struct Only {
        #[command(flatten)]
        access: AccessArgs,
    }
    let mut root = Only::command();
    root.build();
    let mut kept = Vec::new();
    let mut words = words.iter();
    while let Some(word) = words.next() {
        if let Some(arg) = flag(&root, word) {
            kept.push(word.clone());
            if takes_value(&arg) && !word.contains('=') {
                kept.extend(words.next().cloned());
            }
        }
    }
    Only::try_parse_from(&kept).map_or_else(
        |_| AccessArgs {
            kubeconfig: None,
            context: None,
            cluster: None,
            user: None,
            namespace: String::new(),
        },
        |only| only.access,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn complete(words: &[&str]) -> Vec<String> {
        let words: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
        let text = answer(&words, |access| {
            assert!(access.context.is_none() || access.context.as_deref() == Some("c"));
            vec!["node-1".into(), "node-2".into()]
        });
        let mut lines: Vec<String> = text
            .lines()
            .map(|line| line.split('\t').next().unwrap_or_default().to_owned())
            .collect();
        assert_eq!(lines.pop().as_deref(), Some(NO_FILES));
        lines
    }

    #[test]
    fn every_place_has_its_candidates() {
        for subcommand in ["status", "keys", "ping", "graph", "completion"] {
            assert!(complete(&[""]).contains(&subcommand.to_owned()));
        }
        assert_eq!(complete(&["gr"]), ["graph"]);
        assert_eq!(complete(&["ping", ""]), ["node-1", "node-2"]);
        assert_eq!(complete(&["ping", "node-1", ""]), ["node-2"]);
        assert!(complete(&["ping", "node-1", "node-2", ""]).is_empty());
        assert_eq!(complete(&["graph", "node-2", ""]), ["node-1"]);
        assert_eq!(complete(&["status", "node-2"]), ["node-2"]);
        assert_eq!(complete(&["--context", "c", "status", "-o", "json", ""]), ["node-1", "node-2"]);
        assert_eq!(complete(&["keys", "-o", ""]), ["table", "wide", "json"]);
        assert_eq!(complete(&["keys", "--output", "j"]), ["json"]);
        assert_eq!(complete(&["graph", "-o", ""]), ["mermaid", "dot"]);
        assert!(complete(&["completion", ""]).contains(&"zsh".to_owned()));
        assert_eq!(complete(&["keys", "--conte"]), ["--context"]);
        assert!(complete(&["keys", ""]).is_empty());
        assert!(complete(&["--context", ""]).is_empty());
        assert!(complete(&[]).contains(&"status".to_owned()));
    }

    #[test]
    fn the_name_it_is_called_by_decides() {
        assert!(is_asked(Some(OsStr::new("/usr/local/bin/kubectl_complete-mesh"))));
        assert!(!is_asked(Some(OsStr::new("kubectl-mesh"))) && !is_asked(None));
    }
}
