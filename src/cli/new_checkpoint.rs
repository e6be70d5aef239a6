//! `pi0 new-checkpoint`: a random policy to try everything with.

use std::path::{Path, PathBuf};

use clap::ValueEnum;
use serde_json::json;

use super::CliError;
use crate::model::{Dims, ModelError, synthetic};

/// Write a random checkpoint in LeRobot layout, with tokenizer and statistics.
///
/// For demos, tests and times. The tiny one knows no task, but moves a six-joint arm with gripper along smooth closed
/// paths that depend on the joint state and, by a few percent, on images and prompt. The published one has the size of
/// π0 (6.5 GB, bf16): what it computes takes as long, and the arm trembles by a thousandth of a radian. The same seed gives the
/// same bytes.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Where it goes; must be empty, new, or hold an earlier synthetic checkpoint.
    #[arg(value_name = "DIR")]
    dir: PathBuf,
    /// Which policy.
    #[arg(long, value_enum, default_value = "tiny")]
    preset: Preset,
    /// What its random weights and its paths are drawn from.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Write even if the directory holds something else; files of the same names are replaced.
    #[arg(long)]
    force: bool,
    /// Print one JSON object instead of text.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Preset {
    /// π0 with two 224x224 views, 50 actions, four layers a stack: fast on one core.
    Tiny,
    /// π0 of the published size, with 50 actions: for times, not for motion.
    Published,
}

impl Preset {
    fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |v| v.get_name().to_owned())
    }
}

/// Runs the tool.
pub fn run(args: &Args) -> Result<(), CliError> {
    let dir = &args.dir;
    if !args.force && !is_free(dir)? {
        return Err(CliError::input(format!(
            "{}: not empty, and not a synthetic checkpoint; give another directory, or --force to write there anyway",
            dir.display()
        )));
    }
    let files = match args.preset {
        Preset::Tiny => synthetic::write(dir, args.seed)?,
        Preset::Published => synthetic::write_random(dir, &args.preset.name(), &Dims::published(50), args.seed)?,
    };
    if args.json {
        let files: serde_json::Map<_, _> = files.iter().map(|(name, bytes)| ((*name).into(), json!(bytes))).collect();
        println!("{}", json!({ "dir": dir, "preset": args.preset.name(), "seed": args.seed, "bytes": files }));
    } else {
        let bytes: usize = files.iter().map(|(_, bytes)| bytes).sum();
        println!("{}: {} files, {:.1} MB, seed {}", dir.display(), files.len(), bytes as f64 * 1e-6, args.seed);
    }
    Ok(())
}

/// Whether nothing of somebody else's is in `dir`.
fn is_free(dir: &Path) -> Result<bool, CliError> {
    match std::fs::read_dir(dir) {
        Ok(mut entries) => Ok(entries.next().is_none() || synthetic::is_synthetic(dir)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(true),
        Err(source) => Err(ModelError::Io { path: dir.into(), source }.into()),
    }
}
