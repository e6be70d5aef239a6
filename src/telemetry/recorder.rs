//! The flight recorder's memory: what happened in the last seconds, and how it becomes a file.
//!
//! Everything here runs on threads of its own, none of it real-time; what they are fed from is the node's affair.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::bag::{BagWriter, Record, Topic};
use crate::clock::Monotonic;

/// Most bytes of messages held, whatever the seconds: the oldest go first.
pub const MOST_BYTES: usize = 256 << 20;

/// Messages of the last seconds. Topics that are *kept* always have their last message, however old: a prompt said an
/// hour ago still holds.
#[derive(Debug)]
pub struct Ring {
    seconds: f64,
    most_bytes: usize,
    held: VecDeque<(Monotonic, Record)>,
    bytes: usize,
    kept: BTreeMap<Arc<Topic>, Record>,
    keep: Vec<Arc<Topic>>,
}

impl Ring {
    /// A ring of so many seconds and bytes that keeps the last message of `keep`.
    pub fn new(seconds: f64, most_bytes: usize, keep: Vec<Arc<Topic>>) -> Self {
        Self { seconds, most_bytes, held: VecDeque::new(), bytes: 0, kept: BTreeMap::new(), keep }
    }

    /// A message that came at `at`; what is too old by then goes.
    pub fn push(&mut self, at: Monotonic, record: Record) {
        self.bytes += record.data.len();
        self.held.push_back((at, record));
        while self
            .held
            .front()
            .is_some_and(|(first, _)| self.bytes > self.most_bytes || at.seconds_since(*first) > self.seconds)
        {
            let Some((_, old)) = self.held.pop_front() else { break };
            self.bytes -= old.data.len();
            if self.keep.contains(&old.topic) {
                self.kept.insert(old.topic.clone(), old);
            }
        }
    }

    /// Bytes of messages held.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Seconds from the first to the last message held.
    pub fn seconds(&self) -> f64 {
        match (self.held.front(), self.held.back()) {
            (Some((first, _)), Some((last, _))) => last.seconds_since(*first),
            _ => 0.0,
        }
    }

    /// What is held, in the order of its times. The last message of a kept topic from before stands at the beginning,
    /// with the time of the beginning. The bytes are shared, not copied.
    pub fn snapshot(&self) -> Vec<Record> {
        let mut records: Vec<Record> = self.held.iter().map(|(_, record)| record.clone()).collect();
        records.sort_by_key(|r| r.time);
        let begin = records.first().map(|r| r.time);
        let kept = self.kept.values().map(|r| Record { time: begin.unwrap_or(r.time), ..r.clone() });
        kept.chain(records.iter().cloned()).collect()
    }
}

/// How a finished recording's name begins and ends; between the two stand time and reason.
const NAME: (&str, &str) = ("pi0_", ".mcap");
/// Of a recording that is being written.
const UNFINISHED: &str = ".part";

/// Where recordings go, and how many stay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shelf {
    /// The folder; made when it is needed.
    pub folder: PathBuf,
    /// Recordings that stay; the oldest go.
    pub keep: usize,
}

impl Shelf {
    /// Writes a recording; its name says when (`seconds` since 1970, UTC) and why. On failure nothing of it stays, and
    /// the error names the file and what to do.
    pub fn write(
        &self,
        seconds: i64,
        reason: &str,
        facts: &[(&str, String)],
        records: &[Record],
    ) -> Result<PathBuf, String> {
        let failed = |path: &Path, e: std::io::Error| {
            format!("recording '{}' not written: {e}; free space there or set recorder.folder", path.display())
        };
        std::fs::create_dir_all(&self.folder).map_err(|e| failed(&self.folder, e))?;
        let (part, path) = self.free_name(&format!("{}{}_{}", NAME.0, utc(seconds), slug(reason)));
        let written = File::create_new(&part).and_then(|file| {
            let mut bag = BagWriter::new(BufWriter::new(file), facts)?;
            records.iter().try_for_each(|r| bag.write(r))?;
            let file = bag.finish()?.into_inner().map_err(std::io::IntoInnerError::into_error)?;
            // A recording is for the time after a crash.
            file.sync_all()?;
            std::fs::rename(&part, &path)
        });
        if let Err(e) = written {
            let _ = std::fs::remove_file(&part);
            return Err(failed(&path, e));
        }
        self.clear();
        Ok(path)
    }

    /// A name that is not taken: two recordings may end within a second.
    fn free_name(&self, stem: &str) -> (PathBuf, PathBuf) {
        let name = |n: u32| {
            let number = if n == 0 { String::new() } else { format!("_{n}") };
            let path = self.folder.join(format!("{stem}{number}{}", NAME.1));
            let part = self.folder.join(format!("{stem}{number}{}{UNFINISHED}", NAME.1));
            (part, path)
        };
        let free = (0..1000).map(name).find(|(part, path)| !part.exists() && !path.exists());
        free.unwrap_or_else(|| name(0))
    }

    /// Removes the oldest recordings beyond those that stay; other files are left alone.
    fn clear(&self) {
        let Ok(entries) = std::fs::read_dir(&self.folder) else { return };
        let dated = |e: std::fs::DirEntry| {
            let name = e.file_name().into_string().ok().filter(|n| ours(n))?;
            Some((e.metadata().ok()?.modified().ok()?, name))
        };
        let mut found: Vec<_> = entries.flatten().filter_map(dated).collect();
        found.sort();
        for (_, old) in found.iter().take(found.len().saturating_sub(self.keep)) {
            let _ = std::fs::remove_file(self.folder.join(old));
        }
    }
}

/// Whether a recorder gave this name: `pi0_`, what [`utc`] writes, and a [`slug`]. A recording that somebody has renamed
/// is theirs.
fn ours(name: &str) -> bool {
    let Some(stem) = name.strip_prefix(NAME.0).and_then(|n| n.strip_suffix(NAME.1)) else { return false };
    let Some((time, reason)) = stem.split_once('_') else { return false };
    let form: String = time.chars().map(|c| if c.is_ascii_digit() { '0' } else { c }).collect();
    form == "00000000T000000Z" && !reason.is_empty() && reason.chars().all(|c| matches!(c, 'a'..='z' | '0'..='9' | '_'))
}

/// Lower-case letters, digits and single underlines; short.
fn slug(reason: &str) -> String {
    let mut out = String::new();
    for c in reason.chars().take(48) {
        match c.to_ascii_lowercase() {
            c @ ('a'..='z' | '0'..='9') => out.push(c),
            _ if out.ends_with('_') || out.is_empty() => {}
            _ => out.push('_'),
        }
    }
    let out = out.trim_end_matches('_');
    if out.is_empty() { "recording".into() } else { out.into() }
}

/// `20261125T204500Z`: sorts as it is. Days to a date after Howard Hinnant's `civil_from_days`.
fn utc(seconds: i64) -> String {
    let (days, second) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    let z = days + 719_468;
    let (era, doe) = (z.div_euclid(146_097), z.rem_euclid(146_097));
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let month = if mp < 10 { mp + 3 } else { mp - 9 };
    let year = yoe + era * 400 + i64::from(month <= 2);
    let day = doy - (153 * mp + 2) / 5 + 1;
    format!("{year:04}{month:02}{day:02}T{:02}{:02}{:02}Z", second / 3600, second / 60 % 60, second % 60)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bag::BagReader;
    use crate::bag::message::Text;
    use crate::clock::RosTime;
    use proptest::prelude::*;

    fn said(topic: &Arc<Topic>, ms: i64, text: &str) -> (Monotonic, Record) {
        let time = RosTime(1_000_000_000_000 + ms * 1_000_000);
        (Monotonic(ms * 1_000_000), Record::new(topic, time, &Text(text.into())))
    }

    proptest! {
        #[test]
        fn a_ring_holds_the_last_seconds_within_its_bytes_and_what_is_kept(
            steps in prop::collection::vec((0i64..400, 0usize..200, 0usize..3), 1..200),
            seconds in 0.1f64..5.0,
            most in 200usize..20_000,
        ) {
            let topics: Vec<_> = ["/a", "/b", "/prompt"].map(Topic::of::<Text>).to_vec();
            let mut ring = Ring::new(seconds, most, vec![topics[2].clone()]);
            let (mut now, mut all) = (0, Vec::new());
            for (wait, length, topic) in steps {
                now += wait;
                let (at, record) = said(&topics[topic], now, &"x".repeat(length));
                ring.push(at, record.clone());
                all.push((at, record));
                let held = ring.snapshot();
                let recent: Vec<_> = held.iter().filter(|r| !(r.topic == topics[2] && r.time == held[0].time)).collect();
                prop_assert!(ring.bytes() <= most);
                prop_assert!(ring.seconds() <= seconds);
                prop_assert!(held.windows(2).all(|w| w[0].time <= w[1].time));
                // The newest messages, without a gap.
                prop_assert!(recent.iter().rev().zip(all.iter().map(|(_, r)| r)
                    .filter(|r| !(r.topic == topics[2] && r.time == held[0].time)).rev()).all(|(a, b)| **a == *b));
                // The last prompt is there, once it was said, unless it is larger than the ring.
                if let Some((_, last)) = all.iter().rev().find(|(_, r)| r.topic == topics[2]) {
                    prop_assert!(held.iter().rev().find(|r| r.topic == topics[2]).is_some_and(|r| r.data == last.data));
                }
            }
        }
    }

    #[test]
    fn a_recording_is_named_by_time_and_reason_and_only_so_many_stay() {
        let dir = tempfile::tempdir().unwrap();
        let shelf = Shelf { folder: dir.path().join("made/when/needed"), keep: 3 };
        let topic = Topic::of::<Text>("/prompt");
        let records = [said(&topic, 5, "go").1];
        let mut paths = Vec::new();
        for i in 0..5 {
            paths.push(shelf.write(1_795_447_329 + i / 2, "Fault: camera 'base' lost!", &[], &records).unwrap());
        }
        let name = |p: &PathBuf| p.file_name().unwrap().to_str().unwrap().to_owned();
        assert_eq!(name(&paths[0]), "pi0_20261123T152209Z_fault_camera_base_lost.mcap");
        assert_eq!(name(&paths[1]), "pi0_20261123T152209Z_fault_camera_base_lost_1.mcap");
        // What somebody else put there, or renamed to keep it.
        let others = [
            "notes.txt",
            "pi0_good_run.mcap",
            "pi0_20261123T152209Z.mcap",
            "pi0_20261123T152209Z_.mcap",
            "pi0_20261123T152209Z_stop (copy).mcap",
            "pi0_2026-11-23_stop.mcap",
            "pi0_20261123T152209Z_stop.mcap.bak",
        ];
        others.iter().for_each(|name| std::fs::write(shelf.folder.join(name), "mine").unwrap());
        shelf.clear();
        let there: Vec<bool> = paths.iter().map(|p| p.exists()).collect();
        assert_eq!(there, [false, false, true, true, true]);
        others.iter().for_each(|name| assert!(shelf.folder.join(name).exists(), "{name}"));
        let back: Vec<_> = BagReader::open(&paths[4]).unwrap().map(Result::unwrap).collect();
        assert_eq!(back, records);
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_named_with_the_remedy() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        let e = Shelf { folder: file.join("below"), keep: 1 }.write(0, "stop", &[], &[]).unwrap_err();
        assert!(e.contains("file/below") && e.contains("Not a directory") && e.contains("recorder.folder"), "{e}");
    }

    /// A disk with room for so many bytes.
    struct Disk(std::io::Cursor<Vec<u8>>, u64);

    impl std::io::Write for Disk {
        fn write(&mut self, b: &[u8]) -> std::io::Result<usize> {
            if self.0.position() + b.len() as u64 > self.1 {
                return Err(std::io::Error::from_raw_os_error(28));
            }
            self.0.write(b)
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    impl std::io::Seek for Disk {
        fn seek(&mut self, to: std::io::SeekFrom) -> std::io::Result<u64> {
            self.0.seek(to)
        }
    }

    #[test]
    fn a_full_disk_is_an_error_wherever_it_fills_up() {
        let topic = Topic::of::<Text>("/prompt");
        let record = said(&topic, 5, "go").1;
        let write = |room| {
            let mut bag = BagWriter::new(Disk(Default::default(), room), &[("reason", "stop".into())])?;
            bag.write(&record)?;
            bag.finish().map(|disk| disk.0.into_inner().len() as u64)
        };
        let whole = write(u64::MAX).unwrap();
        for room in (0..whole).step_by(7) {
            let e = write(room).err().unwrap();
            assert_eq!(e.raw_os_error(), Some(28), "room for {room} of {whole} bytes: {e}");
        }
    }
}
