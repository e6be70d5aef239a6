//! `pi0`, the offline tools: no ROS needed.
//!
//! A subcommand is a file with its `Args` and a `run`; it joins the tools by one line in [`Command`] and one in
//! [`run`].

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;

use crate::error::{Blame, Fault};

pub mod bench;
pub mod doctor;
pub mod infer;
pub mod jitter;
pub mod new_checkpoint;
pub mod replay;
pub mod step;
pub mod tune;

/// Real-time control with the π0 vision-language-action policy: offline tools.
#[derive(Debug, Parser)]
#[command(name = "pi0", version, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Bench(bench::Args),
    Doctor(doctor::Args),
    Infer(infer::Args),
    Jitter(jitter::Args),
    NewCheckpoint(new_checkpoint::Args),
    Replay(replay::Args),
    Tune(tune::Args),
    Step(step::Args),
}

fn run(command: Command) -> Result<(), CliError> {
    match command {
        Command::Bench(args) => bench::run(&args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Infer(args) => infer::run(&args),
        Command::Jitter(args) => jitter::run(&args),
        Command::NewCheckpoint(args) => new_checkpoint::run(&args),
        Command::Replay(args) => replay::run(&args),
        Command::Tune(args) => tune::run(&args),
        Command::Step(args) => step::run(&args),
    }
}

/// Runs the tool named on the command line; the exit code tells who is at fault ([`Fault::exit_code`]). Standard error gets
/// what `RUST_LOG` asks for, and without it nothing of what is logged.
pub fn main() -> ExitCode {
    if std::env::var_os("RUST_LOG").is_some() {
        let log = tracing_subscriber::fmt().with_env_filter(EnvFilter::from_default_env());
        // Fails only if it was begun before.
        let _ = log.with_writer(std::io::stderr).try_init();
    }
    match run(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {e}");
            ExitCode::from(e.fault.exit_code())
        }
    }
}

/// Why a tool ended early: one message, and who has to act.
#[derive(Debug)]
pub struct CliError {
    /// Decides the exit code.
    pub fault: Fault,
    message: String,
}

impl CliError {
    /// The user's command or files are wrong.
    pub fn input(message: impl Into<String>) -> Self {
        Self { fault: Fault::Input, message: message.into() }
    }
}

impl std::fmt::Display for CliError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl<E: Blame> From<E> for CliError {
    fn from(e: E) -> Self {
        Self { fault: e.fault(), message: e.to_string() }
    }
}
