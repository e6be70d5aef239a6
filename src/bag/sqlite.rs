//! The sqlite3 storage of rosbag2: table `topics`, table `messages`.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rusqlite::{Connection, OpenFlags, params};

use super::{BagError, Record, Topic};
use crate::clock::RosTime;

/// Messages fetched at once.
const PAGE: usize = 64;

/// A bag's messages in the order of their times.
pub(super) struct SqliteReader {
    path: PathBuf,
    db: Connection,
    topics: HashMap<i64, (Arc<Topic>, String)>,
    page: std::vec::IntoIter<Record>,
    /// Time and id of the last message fetched.
    last: (i64, i64),
    read: u64,
    done: bool,
}

impl SqliteReader {
    /// Opens the file at `at`, which people know as `path`.
    pub fn open(at: &Path, path: &Path) -> Result<Self, BagError> {
        let foreign = |e: rusqlite::Error| BagError::Foreign {
            path: path.into(),
            reason: format!("not a rosbag2 database: {e}; was it recorded to its end?"),
        };
        // Its log may lie beside it; a read-only folder must do as well.
        let db = Connection::open_with_flags(at, OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX)
            .map_err(foreign)?;
        let topics = {
            let mut rows = db.prepare("SELECT id, name, type, serialization_format FROM topics").map_err(foreign)?;
            let row = |r: &rusqlite::Row<'_>| {
                let topic = Topic { name: r.get(1)?, kind: r.get(2)? };
                Ok((r.get::<_, i64>(0)?, (Arc::new(topic), r.get::<_, String>(3)?)))
            };
            rows.query_map([], row).map_err(foreign)?.collect::<Result<HashMap<_, _>, _>>().map_err(foreign)?
        };
        Ok(Self {
            path: path.into(),
            db,
            topics,
            page: Vec::new().into_iter(),
            last: (i64::MIN, i64::MIN),
            read: 0,
            done: false,
        })
    }

    /// The topics that hold messages.
    pub fn listed(&self) -> Result<BTreeSet<Arc<Topic>>, rusqlite::Error> {
        let mut query = self.db.prepare("SELECT DISTINCT topic_id FROM messages")?;
        let used = query.query_map([], |row| row.get(0))?.collect::<Result<Vec<i64>, _>>()?;
        Ok(used.iter().filter_map(|id| self.topic(*id)).cloned().collect())
    }

    /// `None` if it is of no ROS 2 node.
    fn topic(&self, id: i64) -> Option<&Arc<Topic>> {
        self.topics.get(&id).filter(|(_, format)| format == "cdr").map(|(topic, _)| topic)
    }

    fn fetch(&mut self) -> Result<Vec<Record>, rusqlite::Error> {
        let mut query = self.db.prepare_cached(
            "SELECT id, topic_id, timestamp, data FROM messages WHERE (timestamp, id) > (?1, ?2) \
             ORDER BY timestamp, id LIMIT ?3",
        )?;
        let mut rows = query.query(params![self.last.0, self.last.1, PAGE as i64])?;
        let mut page = Vec::with_capacity(PAGE);
        self.done = true;
        while let Some(row) = rows.next()? {
            self.done = false;
            let (id, topic, time): (i64, i64, i64) = (row.get(0)?, row.get(1)?, row.get(2)?);
            self.last = (time, id);
            if let Some(topic) = self.topic(topic) {
                let data = row.get_ref(3)?.as_blob().unwrap_or_default();
                page.push(Record { topic: topic.clone(), time: RosTime(time), data: data.into() });
            }
        }
        Ok(page)
    }
}

impl Iterator for SqliteReader {
    type Item = Result<Record, BagError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(record) = self.page.next() {
                self.read += 1;
                return Some(Ok(record));
            }
            if self.done {
                return None;
            }
            match self.fetch() {
                Ok(page) => self.page = page.into_iter(),
                Err(e) => {
                    self.done = true;
                    let reason = e.to_string();
                    return Some(Err(BagError::Damaged { path: self.path.clone(), read: self.read, reason }));
                }
            }
        }
    }
}
