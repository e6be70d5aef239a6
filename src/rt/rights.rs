//! Rights a real-time thread asks for. None is required to run; each says whether it was granted, and if not, why and
//! what to do about it.

use std::fmt;

/// What became of one right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Right {
    /// It is in force; the text says what was granted.
    Granted(String),
    /// It is not; the node runs without it.
    Denied {
        /// What the system said.
        reason: String,
        /// What to do.
        remedy: String,
    },
}

impl Right {
    /// Whether it is in force.
    pub fn granted(&self) -> bool {
        matches!(self, Right::Granted(_))
    }

    fn denied(reason: impl Into<String>, remedy: impl Into<String>) -> Self {
        Right::Denied { reason: reason.into(), remedy: remedy.into() }
    }
}

impl fmt::Display for Right {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Right::Granted(what) => write!(f, "granted: {what}"),
            Right::Denied { reason, remedy } => write!(f, "denied: {reason}; {remedy}"),
        }
    }
}

/// Schedules the calling thread with SCHED_FIFO at `priority` (1 to 99).
pub fn fifo(priority: i32) -> Right {
    if !(1..=99).contains(&priority) {
        return Right::denied(format!("priority {priority} is outside 1 to 99"), "set rt_priority to 1 to 99");
    }
    let param = libc::sched_param { sched_priority: priority };
    // SAFETY: pthread_self is the calling thread, `param` is a valid sched_param for the time of the call.
    let rc = unsafe { libc::pthread_setschedparam(libc::pthread_self(), libc::SCHED_FIFO, &param) };
    if rc == 0 {
        return Right::Granted(format!("SCHED_FIFO {priority}"));
    }
    let limit = soft_limit(libc::RLIMIT_RTPRIO as libc::c_int).map_or_else(|| "unlimited".into(), |l| l.to_string());
    Right::denied(
        format!("SCHED_FIFO {priority}: {} (rtprio limit {limit})", std::io::Error::from_raw_os_error(rc)),
        format!(
            "add '@realtime - rtprio {priority}' to /etc/security/limits.d/ and join that group, \
             or in a container: --cap-add=sys_nice --ulimit rtprio={priority}"
        ),
    )
}

/// Binds the calling thread to CPU `cpu`.
pub fn affinity(cpu: usize) -> Right {
    let cpus = core_affinity::get_core_ids().unwrap_or_default();
    let Some(id) = cpus.iter().copied().find(|c| c.id == cpu) else {
        let known: Vec<String> = cpus.iter().map(|c| c.id.to_string()).collect();
        return Right::denied(
            format!("CPU {cpu} is not among those this process may use ({})", known.join(", ")),
            "set cpu_affinity to one of them",
        );
    };
    if core_affinity::set_for_current(id) {
        Right::Granted(format!("CPU {cpu}"))
    } else {
        Right::denied(format!("the system refused CPU {cpu}"), "check the cpuset of the container or service")
    }
}

/// Keeps in memory every page of this process from the moment it is touched (MCL_ONFAULT), now and in future.
///
/// On fault, so that reserving address space costs nothing. A page of a mapped file counts once it is read: exempt a
/// mapped checkpoint with [`unlock`]. With a limit on locked memory the right is not even asked for, because later
/// allocations past the limit would fail.
pub fn lock_memory() -> Right {
    let remedy = "add '@realtime - memlock unlimited' to /etc/security/limits.d/ and join that group, \
                  or in a container: --ulimit memlock=-1";
    // SAFETY: geteuid takes nothing and cannot fail.
    let root = unsafe { libc::geteuid() } == 0;
    if let Some(limit) = soft_limit(libc::RLIMIT_MEMLOCK as libc::c_int).filter(|_| !root) {
        return Right::denied(format!("locked memory is limited to {} KiB", limit / 1024), remedy);
    }
    // SAFETY: flags only; no memory is passed.
    let rc = unsafe { libc::mlockall(libc::MCL_CURRENT | libc::MCL_FUTURE | libc::MCL_ONFAULT) };
    if rc == 0 {
        Right::Granted("pages stay in memory once touched".into())
    } else {
        Right::denied(format!("mlockall: {}", std::io::Error::last_os_error()), remedy)
    }
}

/// Whether [`lock_memory`] would be granted; nothing stays locked.
pub fn may_lock_memory() -> Right {
    let right = lock_memory();
    if right.granted() {
        // SAFETY: takes nothing; residency only, never content.
        unsafe { libc::munlockall() };
    }
    right
}

/// Exempts a mapping from [`lock_memory`], so that a mapped checkpoint is not pinned page by page as it is read.
pub fn unlock(mapping: &[u8]) -> std::io::Result<()> {
    // SAFETY: the range is that of a live slice; munlock changes residency only, never content.
    let rc = unsafe { libc::munlock(mapping.as_ptr().cast(), mapping.len()) };
    if rc == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

/// Touches 256 KiB of the calling thread's stack, so that its first deep call does not fault in the loop.
#[inline(never)]
pub fn prefault_stack() {
    let mut pages = [0u8; 256 * 1024];
    for i in (0..pages.len()).step_by(1024) {
        pages[i] = i as u8;
    }
    std::hint::black_box(&mut pages);
}

/// The soft limit of a resource; `None` when unlimited or unknown.
fn soft_limit(resource: libc::c_int) -> Option<u64> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is a valid rlimit for the call to fill.
    let rc = unsafe { libc::getrlimit(resource as _, &mut limit) };
    (rc == 0 && limit.rlim_cur != libc::RLIM_INFINITY).then_some(limit.rlim_cur)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What this machine grants is not ours to assert; what is said about it is.
    fn says(right: Right, granted: &str, remedy: &str) {
        match &right {
            Right::Granted(what) => assert!(what.contains(granted), "{right}"),
            Right::Denied { reason, remedy: r } => assert!(!reason.is_empty() && r.contains(remedy), "{right}"),
        }
    }

    #[test]
    fn each_right_is_granted_or_denied_with_a_remedy() {
        std::thread::spawn(|| {
            says(fifo(10), "SCHED_FIFO 10", "rtprio");
            says(affinity(core_affinity::get_core_ids().unwrap()[0].id), "CPU", "cpuset");
            prefault_stack();
        })
        .join()
        .unwrap();
    }

    #[test]
    fn what_cannot_be_is_denied_with_the_value_and_the_remedy() {
        assert!(fifo(0).to_string().contains("priority 0 is outside 1 to 99"));
        let denied = affinity(100_000).to_string();
        assert!(denied.contains("CPU 100000") && denied.contains("cpu_affinity"), "{denied}");
    }
}
