//! Bags read: a folder with metadata.yaml or a bare file, MCAP or sqlite3, plain or compressed with zstd.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, VecDeque};
use std::fs::File;
use std::io::{BufReader, Read, Seek};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use mcap::io::MessageReader;
use mcap::sans_io::LinearReaderOptions;
use yaml_rust2::{Yaml, YamlLoader};

use super::sqlite::SqliteReader;
use super::{BagError, Record, Topic};
use crate::clock::RosTime;

/// Messages of several publishers are written as they come: nearly in the order of their times. One that is later than
/// this behind its order is passed on when it is found.
const DISORDER_NS: i64 = 1_000_000_000;
/// Most bytes held to put messages in order.
const MOST_HELD: usize = 512 << 20;
/// Largest record of an MCAP: a corrupt length must not ask for all memory.
const MOST_RECORD: usize = 1 << 30;

/// What a topic of a bag holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TopicCount {
    /// Its type.
    pub kind: String,
    /// Messages read.
    pub messages: u64,
}

type Messages = Box<dyn Iterator<Item = Result<Record, BagError>>>;

/// Reads the messages of one bag in the order of their times.
pub struct BagReader {
    files: VecDeque<PathBuf>,
    message_zstd: bool,
    current: Option<Messages>,
    held: BinaryHeap<Reverse<Held>>,
    held_bytes: usize,
    newest: i64,
    count: u64,
    damage: Option<BagError>,
    topics: BTreeMap<String, TopicCount>,
    /// Total of messages, if the bag says.
    expected: Option<u64>,
}

/// A message on its way to its place.
struct Held {
    key: (i64, u64),
    record: Record,
}

impl PartialEq for Held {
    fn eq(&self, other: &Self) -> bool {
        self.key == other.key
    }
}
impl Eq for Held {}
impl PartialOrd for Held {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Held {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.key.cmp(&other.key)
    }
}

impl BagReader {
    /// Opens a bag: a folder as `ros2 bag record` writes it, or one of its files.
    pub fn open(path: &Path) -> Result<Self, BagError> {
        let is_folder = std::fs::metadata(path).map_err(BagError::io(path))?.is_dir();
        let (files, message_zstd, expected) =
            if is_folder { folder(path)? } else { (vec![path.to_owned()], false, None) };
        // All of them, so that a missing one is found before an hour of the others has been replayed.
        for file in &files {
            File::open(file).map_err(BagError::io(file))?;
        }
        let mut reader = Self {
            files: files.into(),
            message_zstd,
            current: None,
            held: BinaryHeap::new(),
            held_bytes: 0,
            newest: i64::MIN,
            count: 0,
            damage: None,
            topics: BTreeMap::new(),
            expected,
        };
        reader.next_file()?;
        Ok(reader)
    }

    /// Topics read so far.
    pub fn topics(&self) -> &BTreeMap<String, TopicCount> {
        &self.topics
    }

    /// Messages in the bag, if it says.
    pub fn expected(&self) -> Option<u64> {
        self.expected
    }

    fn next_file(&mut self) -> Result<(), BagError> {
        self.current = match self.files.pop_front() {
            Some(path) => Some(messages(&path, &path)?),
            None => None,
        };
        Ok(())
    }

    /// The next message as it stands in the files.
    fn next_stored(&mut self) -> Option<Result<Record, BagError>> {
        loop {
            match self.current.as_mut()?.next() {
                Some(Ok(record)) if self.message_zstd => {
                    let plain = zstd::stream::decode_all(&*record.data);
                    return Some(plain.map(|data| Record { data: data.into(), ..record.clone() }).map_err(|e| {
                        let reason = format!("cannot be decompressed: {e}");
                        BagError::Message { topic: record.topic.name.clone(), time: record.time, reason }
                    }));
                }
                Some(result) => return Some(result),
                None => {
                    if let Err(e) = self.next_file() {
                        self.current = None;
                        return Some(Err(e));
                    }
                }
            }
        }
    }

    fn hold(&mut self, record: Record) {
        let entry = self.topics.entry(record.topic.name.clone());
        entry.or_insert_with(|| TopicCount { kind: record.topic.kind.clone(), messages: 0 }).messages += 1;
        self.held_bytes += record.data.len();
        self.newest = self.newest.max(record.time.0);
        self.held.push(Reverse(Held { key: (record.time.0, self.count), record }));
        self.count += 1;
    }
}

impl Iterator for BagReader {
    type Item = Result<Record, BagError>;

    /// An error is the last item; what was read before it comes first.
    fn next(&mut self) -> Option<Self::Item> {
        while self.damage.is_none() {
            let ripe = self.held.peek().is_some_and(|Reverse(h)| h.key.0 < self.newest.saturating_sub(DISORDER_NS));
            if ripe || self.held_bytes > MOST_HELD {
                break;
            }
            match self.next_stored() {
                Some(Ok(record)) => self.hold(record),
                Some(Err(e)) => {
                    self.damage = Some(e);
                    self.current = None;
                }
                None => break,
            }
        }
        if let Some(Reverse(Held { record, .. })) = self.held.pop() {
            self.held_bytes -= record.data.len();
            return Some(Ok(record));
        }
        // Said once; afterwards there is nothing more.
        self.damage.take().map(|e| {
            self.files.clear();
            Err(e)
        })
    }
}

/// The files of a bag folder, whether each message is compressed, and the number of messages.
fn folder(path: &Path) -> Result<(Vec<PathBuf>, bool, Option<u64>), BagError> {
    let file = path.join("metadata.yaml");
    let foreign = |reason: String| BagError::Foreign { path: file.clone(), reason };
    let text = match std::fs::read_to_string(&file) {
        Ok(text) => text,
        // A recorder that was killed leaves none.
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return loose_files(path),
        Err(e) => return Err(BagError::io(&file)(e)),
    };
    let yaml = YamlLoader::load_from_str(&text).map_err(|e| foreign(format!("not YAML: {e}")))?;
    let info = yaml.first().map_or(&Yaml::BadValue, |y| &y["rosbag2_bagfile_information"]);
    let names: Vec<_> = info["relative_file_paths"].as_vec().into_iter().flatten().filter_map(Yaml::as_str).collect();
    if names.is_empty() {
        return Err(foreign("lists no files under rosbag2_bagfile_information: relative_file_paths".into()));
    }
    let compression = info["compression_format"].as_str().unwrap_or_default();
    if !["", "zstd"].contains(&compression) {
        return Err(foreign(format!("compression_format '{compression}' is not supported; use zstd or none")));
    }
    let per_message = info["compression_mode"].as_str().is_some_and(|m| m.eq_ignore_ascii_case("message"));
    let count = info["message_count"].as_i64().and_then(|n| u64::try_from(n).ok());
    Ok((names.iter().map(|name| path.join(name)).collect(), per_message, count))
}

/// The bag files of a folder without metadata, by name.
fn loose_files(path: &Path) -> Result<(Vec<PathBuf>, bool, Option<u64>), BagError> {
    let is_bag = |p: &PathBuf| {
        let name = p.file_name().unwrap_or_default().to_string_lossy();
        let name = name.strip_suffix(".zstd").unwrap_or(&name);
        name.ends_with(".mcap") || name.ends_with(".db3")
    };
    let entries = std::fs::read_dir(path).map_err(BagError::io(path))?;
    let mut files: Vec<_> = entries.filter_map(|e| Some(e.ok()?.path())).filter(is_bag).collect();
    files.sort();
    if files.is_empty() {
        let reason = "holds neither metadata.yaml nor an .mcap or .db3 file: give a bag's folder or file".into();
        return Err(BagError::Foreign { path: path.into(), reason });
    }
    Ok((files, false, None))
}

/// The messages of the file at `at`, whatever it is called: its first bytes tell what it is. People know it as `path`.
fn messages(at: &Path, path: &Path) -> Result<Messages, BagError> {
    let mut file = File::open(at).map_err(BagError::io(path))?;
    let mut start = Vec::new();
    file.by_ref().take(16).read_to_end(&mut start).map_err(BagError::io(path))?;
    file.rewind().map_err(BagError::io(path))?;
    if start.starts_with(mcap::MAGIC) {
        Ok(Box::new(McapMessages::new(path, BufReader::with_capacity(1 << 16, file))))
    } else if start.starts_with(b"SQLite format 3\0") {
        Ok(Box::new(SqliteReader::open(at, path)?))
    } else if start.starts_with(&ZSTD) && at == path {
        // The name goes when this returns; what has it open reads on.
        messages(&unpack(path, file)?.0, path)
    } else {
        let reason = match &*start {
            [] => "is empty: the recording never began".into(),
            start => format!("is no bag: it starts with {start:02x?}, and neither MCAP nor sqlite3 does"),
        };
        Err(BagError::Foreign { path: path.into(), reason })
    }
}

/// First bytes of a zstd frame.
const ZSTD: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

/// A compressed file, unpacked among the temporary files of this machine.
fn unpack(path: &Path, file: File) -> Result<TempFile, BagError> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let name = format!("pi0-bag-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
    let temp = TempFile(std::env::temp_dir().join(name));
    let mut to = File::create(&temp.0).map_err(BagError::io(&temp.0))?;
    zstd::stream::copy_decode(BufReader::new(file), &mut to).map_err(BagError::io(path))?;
    Ok(temp)
}

/// Gone with its value.
struct TempFile(PathBuf);

impl Drop for TempFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// The messages of one MCAP as they are written.
struct McapMessages {
    path: PathBuf,
    reader: MessageReader<BufReader<File>>,
    topics: Vec<(u16, Arc<Topic>)>,
    read: u64,
}

impl McapMessages {
    fn new(path: &Path, file: BufReader<File>) -> Self {
        let options =
            LinearReaderOptions::default().with_record_length_limit(MOST_RECORD).with_validate_chunk_crcs(true);
        let reader = MessageReader::new_with_options(file, options);
        Self { path: path.into(), reader, topics: Vec::new(), read: 0 }
    }
}

impl Iterator for McapMessages {
    type Item = Result<Record, BagError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let message = match self.reader.next()? {
                Ok(message) => message,
                Err(e) => {
                    let reason = match e {
                        mcap::McapError::UnexpectedEof | mcap::McapError::UnexpectedEoc => "it is cut off".into(),
                        e => e.to_string(),
                    };
                    return Some(Err(BagError::Damaged { path: self.path.clone(), read: self.read, reason }));
                }
            };
            if message.channel.message_encoding != "cdr" {
                continue; // of no ROS 2 node
            }
            let known = self.topics.iter().find(|(id, _)| *id == message.channel.id);
            let topic = match known {
                Some((_, topic)) => topic.clone(),
                None => {
                    let kind = message.channel.schema.as_ref().map(|s| s.name.clone()).unwrap_or_default();
                    let topic = Arc::new(Topic { name: message.channel.topic.clone(), kind });
                    self.topics.push((message.channel.id, topic.clone()));
                    topic
                }
            };
            self.read += 1;
            let time = RosTime(i64::try_from(message.log_time).unwrap_or(i64::MAX));
            return Some(Ok(Record { topic, time, data: message.data.into() }));
        }
    }
}
