//! Bags read: a folder with metadata.yaml or a bare file, MCAP or sqlite3, plain or compressed with zstd.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, VecDeque};
use std::fs::File;
use std::io::{self, BufReader, Read, Seek};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use mcap::io::MessageReader;
use mcap::sans_io::{LinearReaderOptions, SummaryReadEvent, SummaryReader, SummaryReaderOptions};
use yaml_rust2::{Yaml, YamlLoader};

use super::sqlite::SqliteReader;
use super::{BagError, Record, Topic};
use crate::clock::RosTime;

/// Messages of several publishers are written as they come: nearly in the order of their times. One that is later than
/// this behind its order is passed on when it is found.
const DISORDER_NS: i64 = 1_000_000_000;
/// Most bytes held to put messages in order.
const MOST_HELD: usize = 512 << 20;
/// Largest record of an MCAP, and largest message unpacked: a corrupt length must not ask for all memory.
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
        let (files, expected) = files(path)?;
        // All of them, so that a missing one is found before an hour of the others has been replayed.
        for file in &files {
            File::open(file).map_err(BagError::io(file))?;
        }
        let mut reader = Self {
            files: files.into(),
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

    /// The files of a bag.
    pub fn files(path: &Path) -> Result<Vec<PathBuf>, BagError> {
        Ok(files(path)?.0)
    }

    /// The topics of a bag that hold messages. They are looked for up to a damage: reading says what that is.
    pub fn contents(path: &Path) -> Result<BTreeSet<Arc<Topic>>, BagError> {
        Ok(files(path)?.0.iter().map_while(|file| topics(file, file).ok()).flatten().collect())
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
                // Whether messages are compressed stands in metadata.yaml only, which may be lost. None that is not
                // begins so: CDR's first byte is 0.
                Some(Ok(record)) if record.data.starts_with(&ZSTD) => {
                    return Some(match decompress(&record.data, MOST_RECORD) {
                        Ok(data) => Ok(Record { data: data.into(), ..record }),
                        Err(e) => {
                            let reason = format!("cannot be decompressed: {e}");
                            Err(BagError::Message { topic: record.topic.name.clone(), time: record.time, reason })
                        }
                    });
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

/// What a zstd frame holds, if it is no more than `most` bytes.
fn decompress(frame: &[u8], most: usize) -> io::Result<Vec<u8>> {
    let mut plain = Vec::new();
    zstd::stream::read::Decoder::with_buffer(frame)?.take(most as u64 + 1).read_to_end(&mut plain)?;
    if plain.len() > most {
        return Err(io::Error::other(format!("it holds more than {most} bytes")));
    }
    Ok(plain)
}

/// The files of a bag, and the number of messages if it says.
fn files(path: &Path) -> Result<(Vec<PathBuf>, Option<u64>), BagError> {
    let is_folder = std::fs::metadata(path).map_err(BagError::io(path))?.is_dir();
    if is_folder { folder(path) } else { Ok((vec![path.to_owned()], None)) }
}

/// The files of a bag folder, and the number of messages.
fn folder(path: &Path) -> Result<(Vec<PathBuf>, Option<u64>), BagError> {
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
    let count = info["message_count"].as_i64().and_then(|n| u64::try_from(n).ok());
    Ok((names.iter().map(|name| path.join(name)).collect(), count))
}

/// The bag files of a folder without metadata, by name.
fn loose_files(path: &Path) -> Result<(Vec<PathBuf>, Option<u64>), BagError> {
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
    Ok((files, None))
}

/// How a file stores its messages.
enum Storage {
    Mcap(File),
    Sqlite,
    /// One of the others, compressed.
    Zstd(File),
}

/// The storage of the file at `at`, whatever it is called: its first bytes tell what it is. People know it as `path`.
fn storage(at: &Path, path: &Path) -> Result<Storage, BagError> {
    let mut file = File::open(at).map_err(BagError::io(path))?;
    let mut start = Vec::new();
    file.by_ref().take(16).read_to_end(&mut start).map_err(BagError::io(path))?;
    file.rewind().map_err(BagError::io(path))?;
    if start.starts_with(mcap::MAGIC) {
        Ok(Storage::Mcap(file))
    } else if start.starts_with(b"SQLite format 3\0") {
        Ok(Storage::Sqlite)
    } else if start.starts_with(&ZSTD) && at == path {
        Ok(Storage::Zstd(file))
    } else {
        let reason = match &*start {
            [] => "is empty: the recording never began".into(),
            start => format!("is no bag: it starts with {start:02x?}, and neither MCAP nor sqlite3 does"),
        };
        Err(BagError::Foreign { path: path.into(), reason })
    }
}

/// The messages of the file at `at`, which people know as `path`.
fn messages(at: &Path, path: &Path) -> Result<Messages, BagError> {
    Ok(match storage(at, path)? {
        Storage::Mcap(file) => Box::new(McapMessages::new(path, BufReader::with_capacity(1 << 16, file))),
        Storage::Sqlite => Box::new(SqliteReader::open(at, path)?),
        // The name goes when this returns; what has it open reads on.
        Storage::Zstd(file) => messages(&unpack(path, file)?.0, path)?,
    })
}

/// The topics of the same file that hold messages: as it lists them, else found by reading it.
fn topics(at: &Path, path: &Path) -> Result<BTreeSet<Arc<Topic>>, BagError> {
    let listed = match storage(at, path)? {
        Storage::Mcap(file) => listed(file),
        Storage::Sqlite => SqliteReader::open(at, path)?.listed().ok(),
        Storage::Zstd(file) => return topics(&unpack(path, file)?.0, path),
    };
    Ok(match listed {
        Some(topics) => topics,
        None => messages(at, path)?.map_while(Result::ok).map(|record| record.topic).collect(),
    })
}

/// The topics in the summary of an MCAP; one that was cut off has none.
fn listed(mut file: File) -> Option<BTreeSet<Arc<Topic>>> {
    let size = file.metadata().ok()?.len();
    let options = SummaryReaderOptions::default().with_file_size(size).with_record_length_limit(MOST_RECORD);
    let mut reader = SummaryReader::new_with_options(options);
    while let Some(event) = reader.next_event() {
        match event.ok()? {
            SummaryReadEvent::ReadRequest(size) => {
                let read = file.read(reader.insert(size)).ok()?;
                reader.notify_read(read);
            }
            SummaryReadEvent::SeekRequest(to) => {
                let at = file.seek(to).ok()?;
                reader.notify_seeked(at);
            }
        }
    }
    let summary = reader.finish()?;
    let stats = summary.stats?;
    let counts = stats.channel_message_counts;
    if counts.is_empty() && stats.message_count > 0 {
        return None; // not counted by channel
    }
    let used = counts.iter().filter(|(_, messages)| **messages > 0);
    let channels = used.map(|(id, _)| summary.channels.get(id)).collect::<Option<Vec<_>>>()?;
    Some(channels.into_iter().filter_map(|channel| topic(channel)).collect())
}

/// The topic of a channel; `None` if it is of no ROS 2 node.
fn topic(channel: &mcap::Channel<'_>) -> Option<Arc<Topic>> {
    let kind = channel.schema.as_ref().map(|s| s.name.clone()).unwrap_or_default();
    (channel.message_encoding == "cdr").then(|| Arc::new(Topic { name: channel.topic.clone(), kind }))
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
    /// By channel; `None` for one that is passed over.
    topics: Vec<(u16, Option<Arc<Topic>>)>,
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
            let known = self.topics.iter().find(|(id, _)| *id == message.channel.id);
            let topic = match known {
                Some((_, topic)) => topic.clone(),
                None => {
                    let topic = topic(&message.channel);
                    self.topics.push((message.channel.id, topic.clone()));
                    topic
                }
            };
            let Some(topic) = topic else { continue };
            self.read += 1;
            let time = RosTime(i64::try_from(message.log_time).unwrap_or(i64::MAX));
            return Some(Ok(Record { topic, time, data: message.data.into() }));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bag::message::Text;
    use crate::bag::{BagWriter, Message};

    fn said(topic: &str, seconds: i64, text: &str) -> Record {
        Record::new(&Topic::of::<Text>(topic), RosTime(seconds * 1_000_000_000), &Text(text.into()))
    }

    fn mcap(path: &Path, records: &[Record]) {
        let mut bag = BagWriter::new(File::create(path).unwrap(), &[]).unwrap();
        records.iter().for_each(|r| bag.write(r).unwrap());
        bag.finish().unwrap();
    }

    #[test]
    fn compressed_messages_are_read_without_metadata_and_none_asks_for_all_memory() {
        let dir = tempfile::tempdir().unwrap();
        let plain = [said("/prompt", 1, "pick"), said("/prompt", 2, "place")];
        let zstd = |data: &[u8]| zstd::stream::encode_all(data, 1).unwrap();
        let packed = plain.each_ref().map(|r| Record { data: zstd(&r.data).into(), ..r.clone() });
        mcap(&dir.path().join("a.mcap"), &packed);
        for bag in [dir.path().join("a.mcap"), dir.path().to_owned()] {
            let read: Vec<_> = BagReader::open(&bag).unwrap().map(Result::unwrap).collect();
            assert_eq!(read, plain, "{}", bag.display());
        }

        let cut = Record { data: packed[1].data[..9].into(), ..packed[1].clone() };
        mcap(&dir.path().join("a.mcap"), &[packed[0].clone(), cut]);
        let e = BagReader::open(dir.path()).unwrap().find_map(Result::err).unwrap().to_string();
        assert!(e.contains("message on /prompt at 2.000000000 s: cannot be decompressed"), "{e}");

        let zeros = zstd(&[0; 5000]);
        assert_eq!(decompress(&zeros, 5000).unwrap().len(), 5000);
        let e = decompress(&zeros, 4999).unwrap_err().to_string();
        assert!(e.contains("more than 4999 bytes"), "{e}");
        assert_eq!(Text::from_cdr(&plain[0].data).unwrap().0, "pick");
    }

    #[test]
    fn contents_are_what_is_there_also_where_nothing_lists_them() {
        let dir = tempfile::tempdir().unwrap();
        let names = |path: &Path| -> Vec<String> {
            BagReader::contents(path).unwrap().iter().map(|t| t.name.clone()).collect()
        };
        let [a, b, c] = ["a.mcap", "b.mcap.zstd", "c.db3"].map(|name| dir.path().join(name));
        mcap(&a, &[said("/first", 1, "x"), said("/second", 2, "y")]);
        let whole = std::fs::read(&a).unwrap();
        assert!(listed(File::open(&a).unwrap()).is_some());
        std::fs::write(&b, zstd::stream::encode_all(&whole[..], 1).unwrap()).unwrap();
        assert_eq!(names(&a), ["/first", "/second"]);
        assert_eq!(names(&b), ["/first", "/second"]);
        // Without its end: read, as far as that goes.
        std::fs::write(&a, &whole[..whole.len() - 20]).unwrap();
        assert!(listed(File::open(&a).unwrap()).is_none());
        assert_eq!(names(&a), ["/first", "/second"]);
        // A topic that nobody spoke on is none.
        let db = rusqlite::Connection::open(&c).unwrap();
        db.execute_batch(
            "CREATE TABLE topics(id INTEGER PRIMARY KEY, name TEXT, type TEXT, serialization_format TEXT);
             CREATE TABLE messages(id INTEGER PRIMARY KEY, topic_id INTEGER, timestamp INTEGER, data BLOB);
             INSERT INTO topics VALUES(1, '/silent', 'k', 'cdr'), (2, '/third', 'k', 'cdr'), (3, '/odd', 'k', 'json');
             INSERT INTO messages VALUES(1, 2, 5, x'00'), (2, 3, 6, x'00');",
        )
        .unwrap();
        assert_eq!(names(&c), ["/third"]);
        assert_eq!(names(dir.path()), ["/first", "/second", "/third"]);
    }
}
