//! `pi0 replay` as a user runs it, over the recorded simulated arm.

use std::fs::File;
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use pi0_mps::bag::message::{JointState, Text};
use pi0_mps::bag::{BagReader, BagWriter, Record, Topic};
use pi0_mps::clock::RosTime;
use pi0_mps::model::synthetic;
use serde_json::Value as Json;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// A checkpoint, a folder to write to, and the first seconds of the recording.
struct Bench {
    dir: tempfile::TempDir,
    records: Vec<Record>,
}

impl Bench {
    fn new(seconds: f64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        synthetic::write(&dir.path().join("checkpoint"), 1).unwrap();
        let all = BagReader::open(&Path::new(ROOT).join("tests/fixtures/bags/sim_arm")).unwrap();
        let all: Vec<_> = all.map(Result::unwrap).collect();
        let begin = all[0].time;
        Self { dir, records: all.into_iter().take_while(|r| r.time.seconds_since(begin) < seconds).collect() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn mcap(&self, name: &str, records: &[Record]) -> PathBuf {
        let path = self.path(name);
        let mut bag = BagWriter::new(BufWriter::new(File::create(&path).unwrap()), &[]).unwrap();
        records.iter().for_each(|r| bag.write(r).unwrap());
        bag.finish().unwrap().into_inner().unwrap();
        path
    }

    /// Exit code, what `--json` printed, and the error.
    fn replay(&self, bag: &Path, more: &[&str]) -> (i32, Json, String) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pi0"));
        command.args(["replay", "--json", "--params-file"]).arg(Path::new(ROOT).join("config/robots/sim_arm.yaml"));
        command.arg("--checkpoint").arg(self.path("checkpoint")).args(["--device", "cpu"]).arg(bag).args(more);
        let out = command.output().unwrap();
        let json = serde_json::from_slice(&out.stdout).unwrap_or_default();
        (out.status.code().unwrap_or(-1), json, String::from_utf8_lossy(&out.stderr).into_owned())
    }

    fn done(&self, bag: &Path, more: &[&str]) -> Json {
        let (code, json, error) = self.replay(bag, more);
        assert_eq!(code, 0, "{error}");
        json
    }

    fn refused(&self, bag: &Path, more: &[&str], says: &[&str]) {
        let (code, _, error) = self.replay(bag, more);
        assert_eq!(code, 2, "{error}");
        says.iter().for_each(|part| assert!(error.contains(part), "'{part}' is not in: {error}"));
    }
}

/// The same message on another topic.
fn renamed(r: &Record, name: &str) -> Record {
    Record { topic: Arc::new(Topic { name: name.into(), kind: r.topic.kind.clone() }), ..r.clone() }
}

/// The storage that `ros2 bag record -s sqlite3` makes.
fn sqlite(path: &Path, records: &[Record]) {
    let db = rusqlite::Connection::open(path).unwrap();
    db.execute_batch(
        "CREATE TABLE topics(id INTEGER PRIMARY KEY, name TEXT, type TEXT, serialization_format TEXT, \
         offered_qos_profiles TEXT);
         CREATE TABLE messages(id INTEGER PRIMARY KEY, topic_id INTEGER, timestamp INTEGER, data BLOB); BEGIN",
    )
    .unwrap();
    let mut topics: Vec<Arc<Topic>> = Vec::new();
    for r in records {
        let id = topics.iter().position(|t| *t == r.topic).unwrap_or_else(|| {
            topics.push(r.topic.clone());
            let row = (topics.len() as i64, &r.topic.name, &r.topic.kind);
            db.execute("INSERT INTO topics VALUES(?1, ?2, ?3, 'cdr', '')", row).unwrap();
            topics.len() - 1
        });
        let row = (id as i64 + 1, r.time.0, &r.data[..]);
        db.execute("INSERT INTO messages(topic_id, timestamp, data) VALUES(?1, ?2, ?3)", row).unwrap();
    }
    db.execute_batch("COMMIT").unwrap();
}

#[test]
fn the_same_bag_gives_the_same_digest_however_it_is_stored_and_computed() {
    let bench = Bench::new(1.6);
    let bag = bench.mcap("bag.mcap", &bench.records);
    let out = bench.path("out.mcap");
    let first = bench.done(&bag, &["--threads", "1", "--out", out.to_str().unwrap()]);
    let count = |key: &str| first[key].as_u64().unwrap();
    assert!(count("published") > 50 && count("chunks_adopted") > 2, "{first}");
    assert_eq!(count("ticks"), count("published") + count("unarmed"));
    assert_eq!(first["mode"], "run", "{first}");
    assert_eq!(first["latency_ms"]["encode"]["p50"], first["latency_ms"]["encode"]["max"]);

    // Again, with more threads, compared with the commands of the first time.
    let again = bench.done(&bag, &["--threads", "2", "--compare", out.to_str().unwrap(), "--tolerance", "0"]);
    assert_eq!(again["digest"], first["digest"]);
    assert_eq!(again["comparison"]["largest"], 0.0);
    let commands = again["comparison"]["joints"]["elbow"]["commands"].as_u64().unwrap();
    assert_eq!(commands, count("published"));

    // The same messages from sqlite3, and from a folder of compressed files.
    let database = bench.path("bag.db3");
    sqlite(&database, &bench.records);
    let folder = bench.path("folder");
    std::fs::create_dir(&folder).unwrap();
    let half = bench.records.len() / 2;
    let mut names = Vec::new();
    for (name, part) in [("a.mcap", &bench.records[..half]), ("b.mcap", &bench.records[half..])] {
        let plain = std::fs::read(bench.mcap(name, part)).unwrap();
        std::fs::write(folder.join(format!("{name}.zstd")), zstd::stream::encode_all(&plain[..], 1).unwrap()).unwrap();
        names.push(format!("{name}.zstd"));
    }
    let metadata = format!(
        "rosbag2_bagfile_information:\n  version: 9\n  storage_identifier: mcap\n  compression_format: zstd\n  \
         compression_mode: FILE\n  message_count: {}\n  relative_file_paths: [{}]\n",
        bench.records.len(),
        names.join(", ")
    );
    std::fs::write(folder.join("metadata.yaml"), metadata).unwrap();
    for other in [&database, &folder] {
        assert_eq!(bench.done(other, &[])["digest"], first["digest"], "{}", other.display());
    }

    // What should make a difference does.
    let other = bench.done(&bag, &["-p", "seed:=7", "--compare", out.to_str().unwrap()]);
    assert_ne!(other["digest"], first["digest"]);
    assert!(other["comparison"]["largest"].as_f64().unwrap() > 0.0);
    bench.refused(
        &bag,
        &["-p", "seed:=7", "--compare", out.to_str().unwrap(), "--tolerance", "0"],
        &["more than the tolerance"],
    );
}

#[test]
fn a_truncated_bag_says_what_could_be_read_and_is_replayed_when_asked() {
    let bench = Bench::new(2.0);
    let whole = std::fs::read(bench.mcap("whole.mcap", &bench.records)).unwrap();
    let cut = bench.path("cut.mcap");
    std::fs::write(&cut, &whole[..whole.len() * 3 / 4]).unwrap();
    bench.refused(&cut, &[], &["cut.mcap: damaged after", "cut off", "/joint_states (", "--salvage"]);
    let salvaged = bench.done(&cut, &["--salvage"]);
    assert!(salvaged["published"].as_u64().unwrap() > 0, "{salvaged}");
    let (read, all) = (salvaged["messages"].as_u64().unwrap(), bench.records.len() as u64);
    assert!(read > all / 2 && read < all, "{read} of {all}");
    assert!(salvaged["salvaged_until"].as_str().unwrap().contains("cut off"));
}

#[test]
fn a_foreign_bag_is_told_from_a_damaged_one() {
    let bench = Bench::new(0.5);
    let file = |name: &str, bytes: &[u8]| {
        std::fs::write(bench.path(name), bytes).unwrap();
        bench.path(name)
    };
    bench.refused(&file("notes.txt", b"pick the cube and place it"), &[], &["notes.txt: is no bag", "MCAP"]);
    bench.refused(&file("empty.mcap", b""), &[], &["is empty"]);
    bench.refused(&file("x.db3", b"SQLite format 3\0 and then nothing"), &[], &["not a rosbag2 database"]);
    bench.refused(&bench.path("absent"), &[], &["absent: No such file"]);

    // Another robot's: named by what is missing and what is there.
    let wrist = "/camera/wrist/image_raw";
    let records: Vec<_> =
        bench.records.iter().map(|r| if r.topic.name == wrist { renamed(r, "/top") } else { r.clone() }).collect();
    let other = bench.mcap("other.mcap", &records);
    bench.refused(&other, &["--remap", "nonsense"], &["--remap nonsense: write FROM:=TO"]);
    bench.refused(&other, &[], &["no camera 'wrist' on /camera/wrist/image_raw", "/top (sensor_msgs/msg/Image"]);
    assert_eq!(bench.done(&other, &["--remap", &format!("/top:={wrist}")])["mode"], "ramp");

    // In another namespace it is found, unless there are two.
    let spaced: Vec<_> = bench.records.iter().map(|r| renamed(r, &format!("/left{}", r.topic.name))).collect();
    assert_eq!(bench.done(&bench.mcap("left.mcap", &spaced), &[])["mode"], "ramp");
    let two: Vec<_> =
        spaced.iter().flat_map(|r| [r.clone(), renamed(r, &r.topic.name.replace("/left", "/right"))]).collect();
    let two = bench.mcap("two.mcap", &two);
    bench.refused(&two, &[], &["/left", "/right", "--name"]);
    assert_eq!(bench.done(&two, &["--name", "/right/pi0_mps"])["mode"], "ramp");

    // Bytes that are not what their type says.
    let mut broken = bench.records.clone();
    let at = broken.iter().rposition(|r| r.topic.name == "/joint_states").unwrap();
    broken[at].data = broken[at].data[..20].into();
    let broken = bench.mcap("broken.mcap", &broken);
    bench.refused(&broken, &[], &["message on /joint_states at", "bytes needed", "--salvage"]);
    assert_eq!(bench.done(&broken, &["--salvage"])["messages_left_out"], 1);
}

#[test]
fn a_prompt_in_the_bag_is_followed_and_a_pause_stops_the_replay_until_it_is_armed_again() {
    let bench = Bench::new(1.6);
    let begin = bench.records[0].time;
    let topic = Topic::of::<Text>("/pi0_mps/prompt");
    let mut records = bench.records.clone();
    records.push(Record::new(&topic, begin.plus_seconds(0.7), &Text("wave".into())));
    let plain = bench.done(&bench.mcap("plain.mcap", &bench.records), &[]);
    let told = bench.done(&bench.mcap("told.mcap", &records), &[]);
    assert_eq!(told["used"]["/pi0_mps/prompt"], 1);
    assert_ne!(told["digest"], plain["digest"]);

    // Nothing for a second: the node decelerates, says why, and stays where it is.
    let late = |r: &Record| {
        let later = r.time.seconds_since(begin) > 0.9;
        if !later {
            return r.clone();
        }
        let time = r.time.plus_seconds(1.0);
        match r.decode::<JointState>() {
            Ok(m) => Record::new(&r.topic, time, &JointState { stamp: m.stamp.plus_seconds(1.0), ..m }),
            Err(_) => {
                let m: pi0_mps::bag::message::Image = r.decode().unwrap();
                Record::new(&r.topic, time, &pi0_mps::bag::message::Image { stamp: m.stamp.plus_seconds(1.0), ..m })
            }
        }
    };
    let paused: Vec<_> = bench.records.iter().map(late).collect();
    let paused = bench.mcap("paused.mcap", &paused);
    let once = bench.done(&paused, &[]);
    let says = |json: &Json, text: &str| {
        json["events"].as_array().unwrap().iter().filter(|e| e["text"].as_str().unwrap().contains(text)).count()
    };
    assert_eq!((once["mode"].as_str(), says(&once, "→ ramp")), (Some("active"), 1), "{once}");
    assert!(says(&once, "ms old") > 0, "{once}");
    let again = bench.done(&paused, &["--rearm"]);
    assert_eq!(says(&again, "→ ramp"), 2, "{again}");
    assert_ne!(again["mode"], "active");
}

#[test]
fn another_robot_in_the_bag_is_neither_fed_nor_compared() {
    let bench = Bench::new(0.9);
    let out = bench.path("out.mcap");
    let alone = bench.done(&bench.mcap("alone.mcap", &bench.records), &["--out", out.to_str().unwrap()]);

    // A leader arm is heard before the robot's own messages, and after each of them.
    let leader = |r: &Record| {
        let m: JointState = r.decode().ok()?;
        let positions = m.positions.iter().map(|q| q + 0.3).collect();
        Some(renamed(&Record::new(&r.topic, r.time, &JointState { positions, ..m }), "/leader/joint_states"))
    };
    let mut both: Vec<_> = bench.records.iter().flat_map(|r| [r.clone()].into_iter().chain(leader(r))).collect();
    let first = both.iter().find(|r| r.topic.name == "/leader/joint_states").unwrap().clone();
    both.insert(0, Record { time: both[0].time, ..first });
    let both = bench.done(&bench.mcap("both.mcap", &both), &[]);
    assert_eq!(both["digest"], alone["digest"]);
    assert_eq!(both["used"], alone["used"]);

    // The same for the recording that is compared with.
    let commands: Vec<_> = BagReader::open(&out).unwrap().map(Result::unwrap).collect();
    let within = |space: &'static str| commands.iter().map(move |r| renamed(r, &format!("{space}{}", r.topic.name)));
    let bag = bench.path("alone.mcap");
    let against = |name: &str, records: Vec<Record>| {
        let path = bench.mcap(name, &records).display().to_string();
        ["--compare".to_owned(), path, "--tolerance".into(), "0".into()]
    };
    let late = within("/other").map(|r| Record { time: r.time.plus_seconds(0.02), ..r });
    let exact = against("exact.mcap", late.chain(commands.clone()).collect());
    let spaced = against("spaced.mcap", within("/left").collect());
    for other in [exact, spaced] {
        let compared = bench.done(&bag, &other.each_ref().map(|a| &**a));
        assert_eq!(compared["comparison"]["latency_ms"], compared["latency_ms"]);
    }
    let two = against("two.mcap", within("/left").chain(within("/right")).collect());
    bench.refused(
        &bag,
        &two.each_ref().map(|a| &**a),
        &["two.mcap: both /left/", "/right/", "could be the commands on"],
    );
    for tolerance in ["nan", "-1"] {
        bench.refused(
            &bag,
            &["--compare", out.to_str().unwrap(), &format!("--tolerance={tolerance}")],
            &[&format!("--tolerance {}: must be 0 or more", tolerance.replace("nan", "NaN"))],
        );
    }
}

#[test]
fn what_is_read_is_not_written_and_a_run_that_fails_replaces_nothing() {
    let bench = Bench::new(0.3);
    let folder = bench.path("folder");
    std::fs::create_dir(&folder).unwrap();
    let bag = bench.mcap("folder/a.mcap", &bench.records);
    let bytes = std::fs::read(&bag).unwrap();
    let link = bench.path("link.mcap");
    std::os::unix::fs::symlink(&bag, &link).unwrap();
    let plain = bench.mcap("plain.mcap", &bench.records);
    for (read, compare, out) in [
        (&bag, None, &bag),
        (&bag, None, &link),
        (&folder, None, &bag),
        (&folder, None, &folder.join("b.mcap")),
        (&plain, Some(&folder), &bag),
    ] {
        let mut more = vec!["--out", out.to_str().unwrap()];
        more.extend(compare.iter().flat_map(|bag| ["--compare", bag.to_str().unwrap()]));
        bench.refused(read, &more, &["which is read: choose another file"]);
        assert!(std::fs::read(&bag).unwrap() == bytes, "{} is as it was", bag.display());
    }

    let out = bench.path("out.mcap");
    std::fs::write(&out, "kept").unwrap();
    let cut = bench.path("cut.mcap");
    std::fs::write(&cut, &bytes[..bytes.len() * 3 / 4]).unwrap();
    bench.refused(&cut, &["--out", out.to_str().unwrap()], &["cut off"]);
    assert_eq!(std::fs::read_to_string(&out).unwrap(), "kept");
    let parts = std::fs::read_dir(bench.dir.path())
        .unwrap()
        .filter(|e| e.as_ref().unwrap().file_name().to_string_lossy().contains(".part"));
    assert_eq!(parts.count(), 0);
}

#[test]
fn a_message_with_a_wrong_time_is_refused_or_left_out_and_not_waited_for() {
    let bench = Bench::new(1.6);
    let plain = bench.done(&bench.mcap("plain.mcap", &bench.records), &[]);
    let wrong = |name: &str, at: usize, time: RosTime| {
        let mut records = bench.records.clone();
        records.insert(at, Record { time, ..renamed(&records[0], "/joint_temperatures") });
        bench.mcap(name, &records)
    };
    let future = bench.records[0].time.plus_seconds(4000.0);
    for (bag, says) in [
        // The first is only known to be wrong when the next has come.
        (wrong("first.mcap", 0, RosTime(0)), "the message before it, 0.000000000 s"),
        (
            wrong("inside.mcap", bench.records.len() - 5, RosTime(0)),
            "message on /joint_temperatures at 0.000000000 s: its time is -",
        ),
        (wrong("future.mcap", 40, future), "message on /joint_temperatures at"),
    ] {
        bench.refused(&bag, &[], &[says, "more than 3600 s are not replayed", "--salvage leaves such messages out"]);
        let salvaged = bench.done(&bag, &["--salvage"]);
        assert_eq!((&salvaged["digest"], &salvaged["messages_left_out"]), (&plain["digest"], &1.into()));
    }
}
