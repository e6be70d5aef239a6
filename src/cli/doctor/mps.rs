//! What encoder and decoder could have of the GPU, and whether an MPS daemon runs.

use std::io::Write;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::{Finding, Verdict};
use crate::engine::cuda;
use crate::engine::partition::{Backend, Split};

/// NVIDIA's program that starts, asks and ends the daemon.
const CONTROL: &str = "nvidia-cuda-mps-control";
/// A daemon that lives answers at once.
const PATIENCE: Duration = Duration::from_secs(3);

/// What asking the daemon came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Daemon {
    Answers,
    None,
    /// It took the question and said nothing.
    Silent,
    /// The program that asks is not there.
    Absent,
}

/// Nothing where there is no GPU to divide.
pub(super) fn findings() -> Vec<Finding> {
    let Ok(offer) = cuda::offer(0) else { return Vec::new() };
    let decided = offer.decide(Split { backend: Backend::Auto, encoder: 50, decoder: 50 });
    let partition = match decided {
        Ok(d) => Finding::ok("partition", d.to_string()),
        Err(e) => Finding::new("partition", Verdict::Warn, e.to_string(), ""),
    };
    vec![partition, daemon(ask(CONTROL), offer.mps)]
}

fn daemon(daemon: Daemon, serves_us: bool) -> Finding {
    let place = std::env::var("CUDA_MPS_PIPE_DIRECTORY").unwrap_or_else(|_| "/tmp/nvidia-mps".into());
    match (daemon, serves_us) {
        (_, true) => Finding::ok("MPS daemon", format!("serves this process ({place})")),
        (Daemon::Answers, false) => Finding::new(
            "MPS daemon",
            Verdict::Warn,
            format!("answers at {place}, and the device says that MPS is off"),
            "see its log in CUDA_MPS_LOG_DIRECTORY; it serves one user at a time",
        ),
        (Daemon::Silent, false) => Finding::new(
            "MPS daemon",
            Verdict::Warn,
            format!("does not answer at {place}"),
            "end it (its process is nvidia-cuda-mps-control) and start it again",
        ),
        (Daemon::None, false) => Finding::new(
            "MPS daemon",
            Verdict::Note,
            "none",
            "for partition mps start the node with mps:=true, or run nvidia-cuda-mps-control -d; green needs none",
        ),
        (Daemon::Absent, false) => Finding::new(
            "MPS daemon",
            Verdict::Note,
            format!("{CONTROL} is not in PATH"),
            "it comes with the NVIDIA driver; partition green needs none",
        ),
    }
}

/// Asks the daemon for its servers.
fn ask(control: &str) -> Daemon {
    let silent = |c: &mut Command| c.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    let Ok(mut child) = silent(&mut Command::new(control)) else { return Daemon::Absent };
    if let Some(mut input) = child.stdin.take() {
        // A program that has ended already does not take it: its exit code says why.
        let _ = input.write_all(b"get_server_list\n");
    }
    let end = Instant::now() + PATIENCE;
    while Instant::now() < end {
        match child.try_wait() {
            Ok(Some(status)) if status.success() => return Daemon::Answers,
            Ok(Some(_)) => return Daemon::None,
            Ok(None) => std::thread::sleep(Duration::from_millis(10)),
            Err(_) => break,
        }
    }
    // It is ours; whether it ended by itself meanwhile does not matter.
    let _ = child.kill();
    let _ = child.wait();
    Daemon::Silent
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_daemon_is_asked_and_not_waited_for_forever() {
        assert_eq!(ask("true"), Daemon::Answers);
        assert_eq!(ask("false"), Daemon::None);
        assert_eq!(ask("/no/such/program"), Daemon::Absent);
    }

    #[test]
    fn every_state_has_a_remedy_unless_all_is_well() {
        assert_eq!(daemon(Daemon::Answers, true).verdict, Verdict::Ok);
        for state in [Daemon::Answers, Daemon::None, Daemon::Silent, Daemon::Absent] {
            let f = daemon(state, false);
            assert!(f.verdict > Verdict::Ok && !f.remedy.is_empty(), "{f:?}");
        }
    }
}
