//! Makes the image of a Containerfile and a folder of files.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser;
use image_builder::{Image, Layout, containerfile};

/// Writes an OCI image as one tar file and prints the digest to pin it by.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// The Containerfile.
    #[arg(long)]
    file: PathBuf,
    /// Folder its COPY lines take files from.
    #[arg(long)]
    context: PathBuf,
    /// Name of the image, with a host and a tag.
    #[arg(long)]
    name: String,
    /// Architecture as container images name it; several make one image for all of them. Is TARGETARCH in the file.
    #[arg(long = "platform", required = true, value_parser = ["amd64", "arm64"])]
    platforms: Vec<String>,
    /// Value of an ARG, as NAME=VALUE.
    #[arg(long = "arg", value_parser = pair)]
    arguments: Vec<(String, String)>,
    /// Time of the image and of all files in it, in seconds since 1970.
    #[arg(long, value_parser = clap::value_parser!(u64).range(..=253_402_300_799))]
    epoch: u64,
    /// The tar file.
    output: PathBuf,
}

fn pair(text: &str) -> Result<(String, String), &'static str> {
    let (name, value) = text.split_once('=').ok_or("NAME=VALUE is needed")?;
    Ok((name.to_owned(), value.to_owned()))
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> anyhow::Result<()> {
    let text =
        fs::read_to_string(&args.file).with_context(|| format!("read {}", args.file.display()))?;
    let mut layout = Layout::default();
    for platform in &args.platforms {
        let mut arguments: BTreeMap<String, String> = args.arguments.iter().cloned().collect();
        arguments.insert("TARGETARCH".to_owned(), platform.clone());
        let steps = containerfile::parse(&text, &arguments)
            .with_context(|| format!("{}", args.file.display()))?;
        Image::of_steps(&steps, &args.context, args.epoch)
            .and_then(|image| layout.add(platform, image, args.epoch))
            .with_context(|| format!("make the image for {platform}"))?;
    }
    let digest = layout.write(&args.name, &args.output)?;
    writeln!(std::io::stdout(), "{digest}").context("print the digest")
}
