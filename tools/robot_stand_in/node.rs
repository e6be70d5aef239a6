//! The node under test: a process, its log, and the memory it takes.

use std::fs::File;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::Outcome;

/// A running `control_node`; killed if it is dropped.
pub struct ControlNode {
    child: Child,
    log: PathBuf,
    /// When it was started, also since 1970.
    pub started: Instant,
    epoch: Duration,
}

impl ControlNode {
    /// Starts `program` with these ROS arguments; what it prints goes into `log`.
    pub fn start(program: &Path, arguments: &[String], log: PathBuf) -> Outcome<Self> {
        let failed = |e: std::io::Error| format!("{}: {e}", log.display());
        let output = File::create(&log).map_err(failed)?;
        let errors = output.try_clone().map_err(failed)?;
        let epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut command = Command::new(program);
        command.arg("--ros-args").args(arguments).stdin(Stdio::null()).stdout(output).stderr(errors);
        // Nobody else ends it if this process is killed.
        // SAFETY: between fork and exec only a plain system call is made.
        unsafe {
            command.pre_exec(|| {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                Ok(())
            })
        };
        let child = command.spawn().map_err(|e| format!("{}: {e}", program.display()))?;
        Ok(Self { child, log, started: Instant::now(), epoch })
    }

    /// How it ended, once it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// How it ended within `patience`, if it did.
    pub fn wait(&mut self, patience: Duration) -> Option<ExitStatus> {
        let end = Instant::now() + patience;
        while self.ended().is_none() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(10));
        }
        self.ended()
    }

    /// Ends it with SIGINT, and with SIGKILL if it does not listen.
    pub fn end(&mut self) -> String {
        if self.ended().is_none() {
            // SAFETY: a plain system call; the child has not been waited for, so the number is still its own.
            unsafe { libc::kill(self.child.id() as libc::pid_t, libc::SIGINT) };
        }
        match self.wait(Duration::from_secs(20)) {
            Some(status) => how(status),
            None => {
                let _ = self.child.kill();
                let _ = self.child.wait();
                "not ended by SIGINT within 20 s: killed".into()
            }
        }
    }

    /// Everything that it printed.
    pub fn text(&self) -> String {
        std::fs::read(&self.log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    /// Seconds from its start to the first line of its log that holds `text`, by the log's stamps.
    pub fn logged(&self, text: &str) -> Option<f64> {
        let log = self.text();
        let line = log.lines().find(|l| l.contains(text))?;
        // [INFO] [1795897546.762675049] [pi0_mps]: text
        let stamp: f64 = line.split("] [").nth(1)?.parse().ok()?;
        Some(stamp - self.epoch.as_secs_f64())
    }

    /// The last lines that it printed.
    pub fn tail(&self) -> String {
        let text = self.text();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(15)..].join("\n")
    }

    /// Host memory that is its own and in use, MiB; none if the system does not say.
    pub fn host_mib(&self) -> Option<f64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).ok()?;
        let line = status.lines().find_map(|l| l.strip_prefix("RssAnon:"))?;
        Some(line.trim().trim_end_matches(" kB").trim().parse::<f64>().ok()? / 1024.0)
    }
}

impl Drop for ControlNode {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An exit in words.
pub fn how(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => "an unknown end".into(),
    }
}

/// Memory in use on the first GPU, MiB, as nvidia-smi reads it; none where it is not there.
pub fn gpu_mib() -> Option<f64> {
    let fields = ["--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", "0"];
    let out = Command::new("nvidia-smi").args(fields).output().ok().filter(|out| out.status.success())?;
    String::from_utf8_lossy(&out.stdout).trim().parse().ok()
}
