//! Every command in the README and the guides, read by the program that would run it; what a user does without ROS is
//! run. (`scripts/demo`, `scripts/evaluate`, the services, parameters and transitions are run by `tests/blackbox`.)

use std::fs::File;
use std::io::BufWriter;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use pi0_mps::bag::{BagReader, BagWriter};
use pi0_mps::model::synthetic;
use pi0_mps::node::lifecycle::graph;
use pi0_mps::params::{Params, Value, spec, yaml};
use pi0_mps::ros::args::Args;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");
/// Programs that are not ours: named in the guides, checked by nobody here.
const FOREIGN: &[&str] = &[
    "pip",
    "rosdep",
    "colcon",
    "export",
    "fast-discovery-server",
    "nsys",
    "apt-get",
    ".",
    "source",
    "ip",
    "tc",
    "python",
];
/// Commands of `ros2` that say nothing of this package.
const FOREIGN_ROS2: &[&str] = &["bag", "control", "daemon", "doctor", "interface", "node", "pkg", "security"];

fn root(path: &str) -> PathBuf {
    Path::new(ROOT).join(path)
}

fn read(path: impl AsRef<Path>) -> String {
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.as_ref().display()))
}

/// README, guides, and the cards beside training and checkpoints.
fn documents() -> Vec<PathBuf> {
    let guides = std::fs::read_dir(root("docs")).unwrap().map(|e| e.unwrap().path());
    let mut all: Vec<_> = guides.filter(|p| p.extension().is_some_and(|e| e == "md")).collect();
    all.extend(["README.md", "training/README.md", "checkpoints/touch/README.md"].map(root));
    all.sort();
    all
}

/// What stands in backticks, and what stands in fences but those marked `text`, which hold what was printed or drawn.
fn code(text: &str) -> (Vec<String>, Vec<String>) {
    let (mut fences, mut prose) = (Vec::new(), String::new());
    for (i, part) in text.split("\n```").enumerate() {
        match part.split_once('\n') {
            Some(("text", _)) if i % 2 == 1 => {}
            Some((_, body)) if i % 2 == 1 => fences.push(body.replace("\\\n", " ")),
            _ => prose.push_str(part),
        }
    }
    let words = |span: &str| span.split_whitespace().collect::<Vec<_>>().join(" ");
    (prose.split('`').skip(1).step_by(2).map(words).collect(), fences)
}

/// The words of a command line, without comment and assignments before it.
fn words(line: &str) -> Vec<String> {
    let line = line.split(" #").next().unwrap_or_default();
    let (mut words, mut word, mut quoted) = (Vec::new(), String::new(), false);
    for c in line.chars() {
        match c {
            '"' => quoted = !quoted,
            ' ' if !quoted => words.extend(Some(std::mem::take(&mut word)).filter(|w| !w.is_empty())),
            c => word.push(c),
        }
    }
    words.extend(Some(word).filter(|w| !w.is_empty()));
    let assignments = words.iter().take_while(|w| w.split_once('=').is_some_and(|(n, _)| is_variable(n))).count();
    words.split_off(assignments)
}

fn is_variable(name: &str) -> bool {
    !name.is_empty() && name.chars().all(|c| c.is_ascii_uppercase() || c == '_')
}

/// Every command of a document.
fn commands(text: &str) -> Vec<Vec<String>> {
    let (spans, fences) = code(text);
    let lines =
        fences.iter().flat_map(|f| f.lines()).chain(spans.iter().map(String::as_str).filter(|s| s.contains(' ')));
    lines
        .flat_map(|l| l.split(" && "))
        .map(words)
        .filter(|w| {
            let program = w.first().map_or("", String::as_str);
            ["pi0", "ros2", "control_node", "cargo"].contains(&program) || program.starts_with("scripts/")
        })
        .collect()
}

fn pi0(folder: &Path, arguments: &[String]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_pi0")).args(arguments).current_dir(folder).output().unwrap()
}

/// `[--x Y]` and `a|b` as the reader may write them; N and X are numbers.
fn plain(arguments: &[String]) -> Vec<String> {
    let one = |w: &String| match w.trim_matches(['[', ']']) {
        "N" | "X" => "1".to_owned(),
        w => w.split('|').next().unwrap_or_default().to_owned(),
    };
    arguments.iter().map(one).filter(|w| w != "…").collect()
}

fn robot() -> Params {
    let mut given = yaml::overrides(&read(root("config/robots/sim_arm.yaml")), "pi0_mps").unwrap();
    given.push(("checkpoint".into(), Value::String("/policy".into())));
    Params::from_overrides(given).unwrap()
}

/// Why nobody could run this command.
fn problem(command: &[String]) -> Option<String> {
    let (program, arguments) = (command[0].as_str(), &command[1..]);
    let first = arguments.first().map_or("", String::as_str);
    match program {
        "pi0" => {
            // The help is given once everything before it could be read.
            let out = pi0(Path::new(ROOT), &[plain(arguments), vec!["--help".into()]].concat());
            (!out.status.success()).then(|| String::from_utf8_lossy(&out.stderr).into_owned())
        }
        "control_node" => Args::parse(plain(arguments).into_iter().map(Into::into)).err(),
        "cargo" => cargo(first, arguments),
        "ros2" if FOREIGN_ROS2.contains(&first) => None,
        "ros2" => ros2(first, arguments.get(1..).unwrap_or_default()),
        _ => script(program, arguments),
    }
}

fn cargo(first: &str, arguments: &[String]) -> Option<String> {
    let manifest = read(root("Cargo.toml"));
    let after = |flag: &str| arguments.iter().skip_while(|a| *a != flag).nth(1).cloned().unwrap_or_default();
    let missing = after("--features")
        .split(',')
        .filter(|f| !f.is_empty())
        .find(|f| !manifest.contains(&format!("\n{f} = [")))
        .map(|f| format!("no feature {f}"));
    let (bench, test) = (after("--bench"), after("--test"));
    missing
        .or((!bench.is_empty() && !root(&format!("benches/{bench}.rs")).is_file()).then(|| format!("no bench {bench}")))
        .or((!test.is_empty() && !root(&format!("tests/{test}.rs")).is_file()).then(|| format!("no test {test}")))
        .or((!["build", "test", "bench", "install", "mutants", "fmt", "clippy"].contains(&first))
            .then(|| format!("no command {first}")))
}

fn script(program: &str, arguments: &[String]) -> Option<String> {
    let path = root(program);
    let text = std::fs::read_to_string(&path).ok()?;
    if path.metadata().is_ok_and(|m| m.permissions().mode() & 0o111 == 0) {
        return Some("is not executable".into());
    }
    // A shell script with a Python program of the same name hands its options on.
    let text = text + &std::fs::read_to_string(path.with_extension("py")).unwrap_or_default();
    let options = arguments.iter().filter(|a| a.starts_with("--"));
    options.into_iter().find(|o| !text.contains(o.as_str())).map(|o| format!("has no option {o}"))
}

fn ros2(command: &str, arguments: &[String]) -> Option<String> {
    let at = |i: usize| arguments.get(i).map_or("", String::as_str);
    match (command, at(0)) {
        ("launch", "pi0_mps") => launch(at(1), arguments.get(2..).unwrap_or_default()),
        ("run", "pi0_mps") => match at(1) {
            "control_node" => Args::parse(arguments[2..].iter().map(Into::into)).err(),
            other => (other != "pi0").then(|| format!("no executable {other}")),
        },
        ("launch" | "run", "") | (_, "") => None,
        ("param", verb) => parameter(verb, at(2), at(3)),
        ("lifecycle", "set") => {
            (!at(2).is_empty() && graph().iter().all(|e| e.label != at(2))).then(|| format!("no transition {}", at(2)))
        }
        ("lifecycle", _) => None,
        ("service", "call") => interface(at(1), Some(at(2)).filter(|t| !t.is_empty())),
        ("topic", _) => {
            interface(arguments.iter().skip(1).find(|a| !a.starts_with('-')).map_or("", String::as_str), None)
        }
        ("action" | "component" | "service", _) => None,
        (other, _) => Some(format!("ros2 has no command {other}, or not for this package")),
    }
}

fn launch(file: &str, arguments: &[String]) -> Option<String> {
    let text = std::fs::read_to_string(root("launch").join(file)).ok();
    let Some(text) = text else { return Some(format!("launch/{file} is missing")) };
    for argument in arguments.iter().filter(|a| *a != "…") {
        let Some((name, value)) = argument.split_once(":=") else {
            if argument == "--show-args" {
                continue;
            }
            return Some(format!("{argument} is not NAME:=VALUE"));
        };
        if !text.contains(&format!("\"{name}\"")) {
            return Some(format!("launch/{file} declares no {name}"));
        }
        if name == "robot" && value != "NAME" && !root(&format!("config/robots/{value}.yaml")).is_file() {
            return Some(format!("no robot {value}"));
        }
    }
    None
}

fn parameter(verb: &str, name: &str, value: &str) -> Option<String> {
    match verb {
        "set" => {
            let file = format!("/**:\n  ros__parameters:\n    {name}: {value}\n");
            let changes =
                yaml::overrides(&file, "pi0_mps").and_then(|c| robot().set(&c, false).map_err(|e| e.to_string()));
            changes.err()
        }
        "get" | "describe" => (robot().get(name).is_none()).then(|| format!("no parameter {name}")),
        "dump" | "load" | "list" => None,
        // An enumeration in the text: `describe|get|set`.
        other => (!other.contains('|')).then(|| format!("ros2 param has no {other}")),
    }
}

/// A topic or service of the node must stand in the README's table of interfaces, and be offered by the sources.
fn interface(name: &str, of_type: Option<&str>) -> Option<String> {
    let own = name.trim_start_matches('/').split_once("pi0_mps/").map_or(name, |(_, own)| own).trim_start_matches("~/");
    if own.is_empty() || own.starts_with('/') || own == "diagnostics" {
        return None;
    }
    if robot().settings().outputs.iter().any(|o| o.topic == format!("~/{own}")) {
        return None;
    }
    let readme = read(root("README.md"));
    let row = readme.lines().find(|l| l.starts_with('|') && l.contains(&format!("`~/{own}`")));
    let Some(row) = row else { return Some(format!("the README has no ~/{own} among its interfaces")) };
    let offered =
        std::fs::read_dir(root("src/ros")).unwrap().any(|f| read(f.unwrap().path()).contains(&format!("~/{own}\"")));
    let typed = of_type.is_none_or(|t| row.contains(&t.replace("/srv/", "/").replace("/msg/", "/")));
    (!offered)
        .then(|| format!("nothing in src/ros offers ~/{own}"))
        .or((!typed).then(|| format!("{own} is not of that type")))
}

#[test]
fn every_command_in_the_guides_can_be_run() {
    let mut seen = 0;
    let mut wrong = Vec::new();
    for document in documents() {
        for command in commands(&read(&document)) {
            seen += 1;
            if let Some(why) = problem(&command) {
                wrong.push(format!("{}: {}: {why}", document.display(), command.join(" ")));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(seen > 60, "only {seen} commands found: are they still looked for where they are?");
}

#[test]
fn a_wrong_command_is_noticed() {
    for wrong in [
        "pi0 bench --view 2",
        "pi0 replay BAG --tolerance much --compare X",
        "pi0 tun",
        "scripts/demo --durations 3",
        "control_node --params-file x",
        "ros2 launch pi0_mps control.launch.py robots:=so101",
        "ros2 launch pi0_mps control.launch.py robot:=so10",
        "ros2 param set /pi0_mps mps_encoder_percentage 170",
        "ros2 param set /pi0_mps control_rate_hz 30.0",
        "ros2 param describe /pi0_mps seams",
        "ros2 lifecycle set /pi0_mps start",
        "ros2 service call /pi0_mps/arm std_srvs/srv/SetBool",
        "ros2 service call /pi0_mps/enable std_srvs/srv/Trigger",
        "ros2 topics echo /pi0_mps/status",
        "cargo build --features gpu",
    ] {
        let found = commands(&format!("do `{wrong}` now"));
        assert_eq!(found.len(), 1, "{wrong}");
        assert!(problem(&found[0]).is_some(), "{wrong}");
    }
}

#[test]
fn every_program_in_a_fence_is_known() {
    for document in documents() {
        for fence in code(&read(&document)).1 {
            for words in fence.lines().map(words).filter(|w| !w.is_empty()) {
                let program = words[0].as_str();
                let known = FOREIGN.contains(&program) || !commands(&format!("`{} x`", words.join(" "))).is_empty();
                assert!(known, "{}: who runs '{program}'? (what is no command: ```text)", document.display());
            }
        }
    }
}

#[test]
fn links_lead_somewhere_and_parameters_with_values_are_taken() {
    let mut values = 0;
    for document in documents() {
        let text = read(&document);
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let path = link.split('#').next().unwrap_or_default();
            if !path.is_empty() && !path.contains("://") {
                let to = document.parent().unwrap().join(path);
                assert!(to.exists(), "{}: {link} does not exist", document.display());
            }
        }
        for span in code(&text).0 {
            let Some((name, value)) = span.split_once(": ") else { continue };
            let Some(row) = spec(name).filter(|_| !value.contains('`')) else { continue };
            let file = format!("/**:\n  ros__parameters:\n    {name}: {value}\n");
            let given = yaml::overrides(&file, "pi0_mps").unwrap().remove(0).1;
            let taken = row.kind.coerce(given).and_then(|v| row.check(&v));
            assert!(taken.is_ok(), "{}: `{span}`: {taken:?}", document.display());
            values += 1;
        }
    }
    assert!(values > 10, "only {values} parameters with values found");
}

/// A folder as the README supposes it: a policy, a robot's file, a case from training, a recording.
struct Desk(tempfile::TempDir);

impl Desk {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let to = |name: &str| dir.path().join(name);
        synthetic::write(&to("DIR"), 1).unwrap();
        std::fs::copy(root("config/robots/sim_arm.yaml"), to("my_robot.yaml")).unwrap();
        let records: Vec<_> =
            BagReader::open(&root("tests/fixtures/bags/sim_arm")).unwrap().map(Result::unwrap).collect();
        let begin = records[0].time;
        let mut bag = BagWriter::new(BufWriter::new(File::create(to("BAG")).unwrap()), &[]).unwrap();
        records.iter().take_while(|r| r.time.seconds_since(begin) < 1.0).for_each(|r| bag.write(r).unwrap());
        bag.finish().unwrap();
        Self(dir)
    }

    fn run(&self, command: &[String]) -> String {
        let out = pi0(self.0.path(), &command[1..]);
        let said = String::from_utf8_lossy(&out.stdout).into_owned();
        assert!(out.status.success(), "{}: {said}{}", command.join(" "), String::from_utf8_lossy(&out.stderr));
        said
    }
}

#[test]
fn what_the_readme_says_of_replay_doctor_and_infer_is_what_happens() {
    let desk = Desk::new();
    let all = commands(&read(root("README.md")));
    let one = |begin: &str| {
        let found = all.iter().find(|c| c.join(" ").starts_with(begin));
        found.unwrap_or_else(|| panic!("the README has no `{begin}` any more")).clone()
    };
    let doctor = desk.run(&one("pi0 doctor"));
    assert!(doctor.contains("my_robot.yaml") || doctor.contains("parameters"), "{doctor}");

    let compare = one("pi0 replay BAG");
    let cut = compare.iter().position(|a| a == "--compare").expect("--compare is in the README");
    let first: Vec<_> = compare[..cut].iter().map(|a| a.replace("new.mcap", "old.mcap")).collect();
    let digest = |text: &str| text.lines().find(|l| l.contains("digest")).unwrap_or_default().to_owned();
    let (first, again) = (desk.run(&first), desk.run(&compare));
    assert!(!digest(&first).is_empty(), "{first}");
    assert_eq!(digest(&first), digest(&again), "the same commands to the last bit every time");

    // The case is of the policy whose golden outputs are in the tree.
    let case = root("tests/fixtures/golden/pi0_tiny");
    std::fs::copy(case.join("case.safetensors"), desk.0.path().join("case.safetensors")).unwrap();
    let infer: Vec<_> = one("pi0 infer").iter().map(|a| a.replace("DIR", case.to_str().unwrap())).collect();
    desk.run(&infer);
    let out = std::fs::read(desk.0.path().join("out.safetensors")).unwrap();
    let names = safetensors::SafeTensors::deserialize(&out).unwrap();
    for name in ["actions", "v", "prefix_embs"] {
        assert!(names.tensor(name).is_ok(), "{name}");
    }
}

#[test]
fn the_security_policy_names_every_service_and_topic_of_the_node() {
    let policy = read(root("config/security/policy.xml"));
    let own = policy.split("<enclave ").find(|e| e.starts_with("path=\"/pi0_mps\"")).expect("an enclave of the node");
    let offered = |line: &str| line.split("\"~/").nth(1).and_then(|l| l.split('"').next()).map(str::to_owned);
    let services: Vec<_> = read(root("src/ros/services.rs"))
        .lines()
        .filter(|l| l.contains("offer.service("))
        .filter_map(offered)
        .chain(["stop".into()])
        .collect();
    assert!(services.len() > 10, "{services:?}");
    for service in &services {
        assert!(own.contains(&format!("<service>~/{service}</service>")), "{service}");
    }
    let settings = robot().settings();
    let topics =
        settings.outputs.iter().map(|o| o.topic.clone()).chain(settings.inputs.cameras.iter().map(|c| c.topic.clone()));
    for topic in
        topics.chain(["~/action_chunk", "~/status", "~/transition_event", "~/prompt", "joint_states"].map(Into::into))
    {
        assert!(own.contains(&format!("<topic>{topic}</topic>")), "{topic}");
    }
    let may_command = policy
        .split("<topics publish=\"ALLOW\">")
        .skip(1)
        .filter(|t| t.split("</topics>").next().is_some_and(|t| t.contains("arm/joint_trajectory")));
    assert_eq!(may_command.count(), 1, "one enclave alone may command the arm");
    let may_arm: Vec<_> =
        policy.split("<services request=\"ALLOW\">").skip(1).filter(|s| s.contains("/pi0_mps/enable")).collect();
    assert_eq!(may_arm.len(), 1, "one enclave alone may arm");
}
