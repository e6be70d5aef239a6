//! The command line: what this node must know of it before the middleware reads it.

use std::ffi::OsString;
use std::path::PathBuf;

/// Name of the node unless it is remapped.
pub const NODE_NAME: &str = "pi0_mps";
/// Name of the hidden node that serves `~/stop` from a thread of its own.
pub const STOP_NODE_NAME: &str = "_pi0_mps_stop";

/// What the command line says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Args {
    /// Print the help and leave.
    pub help: bool,
    /// Print the version and leave.
    pub version: bool,
    /// Where to write what ran when, at the end.
    pub trace: Option<PathBuf>,
    /// Level given with `--log-level`, as `tracing` names it.
    pub log_level: Option<&'static str>,
    /// Params files in order.
    pub params_files: Vec<PathBuf>,
    /// New name given to every node of this process by `-r __node:=NAME`.
    pub renamed: Option<String>,
    /// Whether the hidden node has a rule of its own.
    pub stop_node_named: bool,
    /// `--disable-rosout-logs`.
    pub no_rosout: bool,
    /// New names of topics and services, in order.
    pub remapped: Vec<Rule>,
}

/// A remapping: `[node:][rostopic://|rosservice://]from:=to`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// The only node that it is for.
    node: Option<String>,
    /// `rostopic` or `rosservice`, if it is for one of them alone.
    only: Option<String>,
    from: String,
    to: String,
}

impl Args {
    /// Reads the arguments after the program's name. What is between `--ros-args` and `--` is left to the middleware,
    /// which checks it again.
    pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Self, String> {
        let mut parsed = Args::default();
        let mut ros = false;
        let mut args = args.into_iter();
        let mut next = move || {
            args.next()
                .map(|a| a.into_string().map_err(|a| format!("argument {a:?} is not UTF-8; use plain text")))
                .transpose()
        };
        while let Some(arg) = next()? {
            match (ros, arg.as_str()) {
                (false, "--ros-args") => ros = true,
                (true, "--ros-args") => {}
                (true, "--") => ros = false,
                (false, "-h" | "--help") => parsed.help = true,
                (false, "-V" | "--version") => parsed.version = true,
                (false, "--trace") => match next()? {
                    Some(file) => parsed.trace = Some(file.into()),
                    None => return Err("--trace needs a file".into()),
                },
                (false, _) => {
                    return Err(format!(
                        "unknown argument '{arg}'; ROS arguments stand after --ros-args, and --help lists the rest"
                    ));
                }
                (true, "--params-file" | "--log-level" | "-r" | "--remap") => {
                    let Some(value) = next()? else { return Err(format!("{arg} needs a value")) };
                    parsed.ros_option(&arg, &value)?;
                }
                (true, "--disable-rosout-logs") => parsed.no_rosout = true,
                (true, _) => {}
            }
        }
        Ok(parsed)
    }

    fn ros_option(&mut self, option: &str, value: &str) -> Result<(), String> {
        match option {
            "--params-file" => self.params_files.push(value.into()),
            "--log-level" => {
                let (of, level) = value.split_once(":=").unwrap_or((NODE_NAME, value));
                if of == NODE_NAME || self.renamed.as_deref() == Some(of) {
                    self.log_level = Some(tracing_level(level)?);
                }
            }
            _ => {
                if let Some(name) = value.strip_prefix("__node:=").or(value.strip_prefix("__name:=")) {
                    self.renamed.get_or_insert_with(|| name.into());
                }
                self.stop_node_named |= value.starts_with(&format!("{STOP_NODE_NAME}:__node:="));
                if let Some((from, to)) = value.split_once(":=") {
                    let (node, from) = match from.split_once(':') {
                        Some((node, rest)) if !rest.starts_with("//") => (Some(node.to_owned()), rest),
                        _ => (None, from),
                    };
                    let (only, from) = match from.split_once("://") {
                        Some((only, name)) => (Some(only.to_owned()), name),
                        None => (None, from),
                    };
                    self.remapped.push(Rule { node, only, from: from.into(), to: to.into() });
                }
            }
        }
        Ok(())
    }

    /// The full name of a topic of the node `namespace`/`node` after the remappings of the command line. r2r does not
    /// tell the name that a subscription got.
    pub fn topic(&self, name: &str, namespace: &str, node: &str) -> String {
        self.resolve("rostopic", name, namespace, node)
    }

    /// The full name of a service, likewise.
    pub fn service(&self, name: &str, namespace: &str, node: &str) -> String {
        self.resolve("rosservice", name, namespace, node)
    }

    fn resolve(&self, kind: &str, name: &str, namespace: &str, node: &str) -> String {
        let namespace = namespace.trim_end_matches('/');
        let full = |name: &str| match (name.strip_prefix("~/"), name.starts_with('/')) {
            (Some(private), _) => format!("{namespace}/{node}/{private}"),
            (None, true) => name.into(),
            (None, false) => format!("{namespace}/{name}"),
        };
        let name = full(name);
        // A node is meant by the name that it got, not by the one in the code.
        let applies = |r: &&Rule| {
            r.node.as_ref().is_none_or(|of| of == node)
                && r.only.as_ref().is_none_or(|only| only == kind)
                && full(&r.from) == name
        };
        self.remapped.iter().find(applies).map_or_else(|| name.clone(), |r| full(&r.to))
    }

    /// The first params file that cannot be read, with the reason.
    pub fn unreadable_params_file(&self) -> Option<String> {
        self.params_files.iter().find_map(|path| {
            let error = std::fs::File::open(path).err()?;
            Some(format!("params file '{}': {error}", path.display()))
        })
    }

    /// Arguments to put before the others so that a rename of "every node" leaves the hidden node its own name; the
    /// first rule that fits a node wins. A name that is none is left for the middleware to refuse.
    pub fn stop_node_rule(&self) -> Option<[String; 4]> {
        let is_name = |n: &&String| n.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
        let name = self.renamed.as_ref().filter(|_| !self.stop_node_named).filter(is_name)?;
        Some(["--ros-args".into(), "-r".into(), format!("{STOP_NODE_NAME}:__node:=_{name}_stop"), "--".into()])
    }
}

/// A ROS log level as `tracing` names it.
fn tracing_level(level: &str) -> Result<&'static str, String> {
    Ok(match level.to_ascii_lowercase().as_str() {
        "debug" => "debug",
        "info" => "info",
        "warn" => "warn",
        "error" | "fatal" => "error",
        _ => return Err(format!("log level '{level}' is not one of debug, info, warn, error, fatal")),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Args, String> {
        Args::parse(line.split_whitespace().map(OsString::from))
    }

    #[test]
    fn what_launch_passes_is_understood() {
        let args = parse(
            "--ros-args --log-level info --log-level rcl:=debug -r __node:=left -r __ns:=/robot \
             --params-file a.yaml -p x:=1 --params-file b.yaml --log-level left:=DEBUG -- --ros-args -r a:=b",
        )
        .unwrap();
        assert_eq!(args.log_level, Some("debug"));
        assert_eq!(args.params_files, [PathBuf::from("a.yaml"), PathBuf::from("b.yaml")]);
        assert_eq!(args.renamed.as_deref(), Some("left"));
        assert!(args.unreadable_params_file().unwrap().starts_with("params file 'a.yaml': No such file"));
    }

    #[test]
    fn a_renamed_node_leaves_the_hidden_one_its_own_name() {
        let args = parse("--ros-args -r __node:=left").unwrap();
        let rule = args.stop_node_rule().unwrap();
        assert_eq!(rule, ["--ros-args", "-r", "_pi0_mps_stop:__node:=_left_stop", "--"]);
        let again = parse(&format!("{} --ros-args -r __node:=left", rule.join(" "))).unwrap();
        assert_eq!(again.stop_node_rule(), None, "one rule is enough");
        assert_eq!(parse("--ros-args -r pi0_mps:__node:=left").unwrap().stop_node_rule(), None);
    }

    #[test]
    fn topics_and_services_get_the_names_that_the_middleware_gives_them() {
        // The pairs are what rclpy's resolve_topic_name and resolve_service_name say of these rules.
        let args = parse(
            "--ros-args -r __node:=left -r __ns:=/n -r pi0:a:=by_code -r left:b:=by_new -r left:rostopic://c:=c2 \
             -r rosservice://~/stop:=/estop --remap rostopic://~/e:=e2 -r left:rosservice://f:=~/f2 \
             -r /chain:=/chain2 -r /chain2:=/chain3 -r rostopic:///g/h:=g2",
        )
        .unwrap();
        for (given, topic, service) in [
            ("a", "/n/a", "/n/a"),
            ("b", "/n/by_new", "/n/by_new"),
            ("c", "/n/c2", "/n/c"),
            ("~/stop", "/n/left/stop", "/estop"),
            ("~/e", "/n/e2", "/n/left/e"),
            ("f", "/n/f", "/n/left/f2"),
            ("chain", "/n/chain", "/n/chain"),
            ("/chain", "/chain2", "/chain2"),
            ("/g/h", "/n/g2", "/g/h"),
        ] {
            assert_eq!(args.topic(given, "/n", "left"), topic);
            assert_eq!(args.service(given, "/n", "left"), service);
        }
        assert_eq!(Args::default().topic("joint_states", "/", "pi0"), "/joint_states");
    }

    #[test]
    fn what_cannot_be_is_refused() {
        assert!(parse("--help").unwrap().help);
        assert!(parse("--params-file x").unwrap_err().contains("unknown argument '--params-file'"));
        assert!(parse("--ros-args --log-level loud").unwrap_err().contains("'loud' is not one of"));
        assert!(parse("--ros-args -r").unwrap_err().contains("-r needs a value"));
        use std::os::unix::ffi::OsStringExt;
        assert!(Args::parse([OsString::from_vec(vec![0xff])]).unwrap_err().contains("not UTF-8"));
    }
}
