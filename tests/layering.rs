//! The layering table of `src/lib.rs`, checked against the paths that the sources really use; the places where
//! `cfg(feature)` and `unsafe` may stand; and those where no lock and no log may.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Folders or files (a trailing slash is a folder) in which `cfg(feature = …)` may stand.
const CFG_FEATURE: &[&str] = &["engine/mod.rs", "ros/mod.rs", "lib.rs", "bin/"];
/// Where `unsafe` may stand.
const UNSAFE: &[&str] = &["engine/cuda/", "rt/", "model/checkpoint.rs"];
/// What the control thread runs, and what it must not name.
const REAL_TIME: &[&str] = &["control/", "rt/", "node/control_loop.rs"];
const WAITS: &[&str] =
    &["Mutex", "RwLock", "Condvar", "Barrier", "OnceLock", "LazyLock", "tracing", "println", "eprintln"];

/// Row of each module in the table: a module may use those of lower rows and of its own, except that the modules of the
/// last row do not know one another.
struct Layers {
    row: BTreeMap<String, usize>,
    last: usize,
}

impl Layers {
    /// Reads the table from the crate's documentation, where a reader looks for it.
    fn parse(lib: &str) -> Self {
        let mut row = BTreeMap::new();
        let mut rows = 0;
        for line in lib.lines().filter_map(|l| l.strip_prefix("//! | ")) {
            let modules: Vec<&str> = line
                .split('|')
                .next()
                .unwrap_or_default()
                .split("[`")
                .skip(1)
                .filter_map(|m| m.split('`').next())
                .collect();
            if !modules.is_empty() {
                row.extend(modules.iter().map(|m| ((*m).to_owned(), rows)));
                rows += 1;
            }
        }
        Layers { row, last: rows - 1 }
    }

    /// Why `from` must not use `to`, if so.
    fn breach(&self, from: &str, to: &str) -> Option<String> {
        let (Some(a), Some(b)) = (self.row.get(from), self.row.get(to)) else {
            return Some(format!("`{from}` or `{to}` is not in the layering table"));
        };
        match (from == to, a.cmp(b)) {
            (true, _) | (_, std::cmp::Ordering::Greater) => None,
            (_, std::cmp::Ordering::Equal) if *a != self.last => None,
            _ => Some(format!("`{from}` uses `{to}`, which is not above it in the table of src/lib.rs")),
        }
    }
}

/// `text` with comments and the contents of string and char literals blanked, lines kept.
fn code_only(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let at = |i: usize| chars.get(i).copied().unwrap_or('\0');
    let mut out = String::with_capacity(text.len());
    let mut i = 0;
    while i < chars.len() {
        let blank_to = |end: usize, out: &mut String| {
            out.extend(chars[i..end.min(chars.len())].iter().map(|c| if *c == '\n' { '\n' } else { ' ' }));
            end
        };
        let after_word = i > 0 && (at(i - 1).is_alphanumeric() || at(i - 1) == '_');
        i = if at(i) == '/' && at(i + 1) == '/' {
            let end = (i..chars.len()).find(|j| at(*j) == '\n').unwrap_or(chars.len());
            blank_to(end, &mut out)
        } else if at(i) == '/' && at(i + 1) == '*' {
            let (mut depth, mut j) = (1, i + 2);
            while depth > 0 && j < chars.len() {
                match (at(j), at(j + 1)) {
                    ('/', '*') => (depth, j) = (depth + 1, j + 2),
                    ('*', '/') => (depth, j) = (depth - 1, j + 2),
                    _ => j += 1,
                }
            }
            blank_to(j, &mut out)
        } else if at(i) == 'r' && !after_word && {
            let hashes = (i + 1..).take_while(|j| at(*j) == '#').count();
            at(i + 1 + hashes) == '"'
        } {
            let hashes = (i + 1..).take_while(|j| at(*j) == '#').count();
            let closes = |j: usize| at(j) == '"' && (1..=hashes).all(|k| at(j + k) == '#');
            let end = (i + 2 + hashes..chars.len()).find(|j| closes(*j)).unwrap_or(chars.len());
            blank_to(end + 1 + hashes, &mut out)
        } else if at(i) == '"' {
            let mut j = i + 1;
            while j < chars.len() && at(j) != '"' {
                j += if at(j) == '\\' { 2 } else { 1 };
            }
            blank_to(j + 1, &mut out)
        } else if at(i) == '\'' && (at(i + 2) == '\'' || at(i + 1) == '\\') {
            let end = (i + 2..chars.len()).skip(usize::from(at(i + 1) == '\\')).find(|j| at(*j) == '\'');
            blank_to(end.unwrap_or(chars.len()) + 1, &mut out)
        } else {
            out.push(at(i));
            i + 1
        };
    }
    out
}

/// The module path of a source file: `engine/cpu/mod.rs` is `engine::cpu`, `lib.rs` is empty.
fn module_path(file: &str) -> Vec<String> {
    let path = file.strip_suffix(".rs").unwrap_or(file);
    let path = path.strip_suffix("/mod").unwrap_or(path);
    if path == "lib" { Vec::new() } else { path.split('/').map(str::to_owned).collect() }
}

/// Top-level modules of this crate that `code` (a file of module `here`) names, with the line.
fn uses(code: &str, here: &[String]) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    for (start, word) in words(code) {
        let mut rest = &code[start + word.len()..];
        let path = match word {
            "crate" | "pi0_mps" => &[],
            "super" if !code[..start].ends_with("::") => {
                let mut ups = 1;
                while let Some(more) = rest.trim_start().strip_prefix("::").and_then(|r| r.strip_prefix("super")) {
                    (ups, rest) = (ups + 1, more);
                }
                match (here.len() + inline_modules(&code[..start])).saturating_sub(ups) {
                    0 => &[],
                    _ => &here[..1], // the top of the path stays, however much of the rest was climbed
                }
            }
            _ => continue,
        };
        let Some(tail) = rest.trim_start().strip_prefix("::") else { continue };
        let line = code[..start].matches('\n').count() + 1;
        match path.first() {
            Some(top) => found.push((line, top.clone())),
            None => found.extend(heads(tail).into_iter().map(|h| (line, h))),
        }
    }
    found
}

/// How many `mod name {` are open at the end of `code`.
fn inline_modules(code: &str) -> usize {
    let mut open: Vec<bool> = Vec::new();
    for (i, c) in code.char_indices() {
        match c {
            '{' => {
                let before = &code[..i];
                let mut last_words =
                    before[before.rfind([';', '{', '}']).map_or(0, |j| j + 1)..].split_whitespace().rev();
                open.push(last_words.nth(1) == Some("mod"));
            }
            '}' => _ = open.pop(),
            _ => {}
        }
    }
    open.into_iter().filter(|is_module| *is_module).count()
}

/// First names of a use tree: `a::b` gives a, `{a::b, c::{d, e}}` gives a and c.
fn heads(tree: &str) -> Vec<String> {
    let tree = tree.trim_start();
    let name = |s: &str| s.trim_start().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
    let Some(list) = tree.strip_prefix('{') else { return vec![name(tree)] };
    let (mut depth, mut heads, mut begin) = (0, Vec::new(), 0);
    for (i, c) in list.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth > 0 => depth -= 1,
            ',' | '}' if depth == 0 => {
                heads.push(name(&list[begin..i]));
                begin = i + 1;
                if c == '}' {
                    break;
                }
            }
            _ => {}
        }
    }
    heads.retain(|h| !h.is_empty());
    heads
}

/// Words of the code with their places.
fn words(code: &str) -> impl Iterator<Item = (usize, &str)> {
    code.split(|c: char| !(c.is_alphanumeric() || c == '_'))
        .filter(|w| !w.is_empty())
        .map(move |w| (w.as_ptr() as usize - code.as_ptr() as usize, w))
}

fn allowed(file: &str, places: &[&str]) -> bool {
    places.iter().any(|p| if p.ends_with('/') { file.starts_with(p) } else { file == *p })
}

/// Everything that is wrong with one file.
fn breaches(layers: &Layers, file: &str, text: &str) -> Vec<String> {
    let code = code_only(text);
    let here = module_path(file);
    let mut found = Vec::new();
    // lib.rs only declares modules, and the binaries are the outermost shell: they may use all.
    if file != "lib.rs" && !file.starts_with("bin/") {
        for (line, to) in uses(&code, &here) {
            // `crate::Name` of something that lib.rs itself defines or re-exports is no module.
            let is_module = to.chars().next().is_some_and(|c| c.is_lowercase() || c == '_');
            if let Some(why) = layers.breach(&here[0], &to).filter(|_| is_module) {
                found.push(format!("src/{file}:{line}: {why}"));
            }
        }
    }
    for (at, word) in words(&code) {
        let line = code[..at].matches('\n').count() + 1;
        // The string after `feature =` is blanked, so the word itself is looked for.
        if word == "feature" && code[at + word.len()..].trim_start().starts_with('=') && !allowed(file, CFG_FEATURE) {
            found.push(format!("src/{file}:{line}: cfg(feature) stands only in {}", CFG_FEATURE.join(", ")));
        }
        if word == "unsafe" && !allowed(file, UNSAFE) {
            found.push(format!("src/{file}:{line}: unsafe stands only in {}", UNSAFE.join(", ")));
        }
        if WAITS.contains(&word) && allowed(file, REAL_TIME) {
            found.push(format!(
                "src/{file}:{line}: the control thread takes no lock and logs nothing, so no {word} here"
            ));
        }
    }
    found
}

fn sources(folder: &Path, into: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, into);
        } else if path.extension().is_some_and(|e| e == "rs") {
            into.push(path);
        }
    }
}

fn source_folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

fn layers() -> Layers {
    Layers::parse(&std::fs::read_to_string(source_folder().join("lib.rs")).unwrap())
}

#[test]
fn every_module_uses_only_the_layers_above_it() {
    let (layers, src) = (layers(), source_folder());
    let mut files = Vec::new();
    sources(&src, &mut files);
    let mut found = Vec::new();
    for path in &files {
        let file = path.strip_prefix(&src).unwrap().to_string_lossy().replace('\\', "/");
        found.extend(breaches(&layers, &file, &std::fs::read_to_string(path).unwrap()));
    }
    assert!(files.len() > 10, "found only {} sources", files.len());
    assert!(found.is_empty(), "\n{}", found.join("\n"));
}

#[test]
fn the_table_names_every_module_in_order() {
    let layers = layers();
    let lib = std::fs::read_to_string(source_folder().join("lib.rs")).unwrap();
    let declared: Vec<&str> =
        lib.lines().filter_map(|l| l.strip_prefix("pub mod ").and_then(|l| l.strip_suffix(';'))).collect();
    assert!(declared.len() > 8);
    for module in declared {
        assert!(layers.row.contains_key(module), "`{module}` is not in the table of src/lib.rs");
    }
    assert_eq!(layers.row["clock"], 0);
    assert_eq!((layers.row["ros"], layers.row["cli"]), (layers.last, layers.last));
    assert!(layers.row["engine"] < layers.row["control"] && layers.row["params"] < layers.row["node"]);
}

#[test]
fn planted_breaches_are_found() {
    let layers = layers();
    for (file, text) in [
        ("model/frame.rs", "use crate::engine::Engine;"),
        ("model/frame.rs", "use crate::{clock::RosTime, engine::{Engine, cpu}};"),
        ("model/frame.rs", "fn f() { let _ = crate::node::Node::start(); }"),
        ("control/tick.rs", "use super::super::pipeline::Stage;"),
        ("control/mod.rs", "use super::pipeline::Stage;"),
        ("engine/cpu/mod.rs", "use super::super::{\n    node::Node,\n};"),
        ("engine/mod.rs", "mod tests { fn f() {} use super::super::control::chunk; }"),
        ("ros/images.rs", "use crate::cli::progress;"),
        ("cli/mod.rs", "use crate::ros;"),
        ("params/mod.rs", "use crate::elsewhere::Thing;"),
        ("node/mod.rs", "#[cfg(feature = \"cuda\")] fn f() {}"),
        ("node/mod.rs", "#[cfg(all(test, feature = \"ros\"))] fn f() {}"),
        ("control/tick.rs", "fn f(p: *const u8) -> u8 { unsafe { *p } }"),
        ("model/frame.rs", "const A: char = '\"'; unsafe fn f() {}"),
        ("control/tick.rs", "use std::sync::Mutex;"),
        ("node/control_loop.rs", "fn f() { tracing::info!(\"late\"); }"),
        ("model/frame.rs", "const A: &str = r#\"\"#; fn f<'a>() { unsafe { g() } }"),
    ] {
        assert_eq!(breaches(&layers, file, text).len(), 1, "{file}: {text}: {:?}", breaches(&layers, file, text));
    }
}

#[test]
fn what_is_allowed_is_not_reported() {
    let layers = layers();
    for (file, text) in [
        ("engine/mod.rs", "use crate::model::{Dims, Frame}; use crate::error::Blame;"),
        ("engine/mod.rs", "#[cfg(feature = \"cuda\")] pub mod cuda;"),
        ("engine/cuda/driver.rs", "fn f() { unsafe { g() } }"),
        ("engine/cpu/matmul.rs", "use super::super::Engine; use super::weights; use crate::engine::View;"),
        ("clock.rs", "use crate::error::Fault;"),
        ("ros/mod.rs", "use crate::node::Node; use crate::params::Params; #[cfg(feature = \"ros\")] mod inner;"),
        ("bin/control_node.rs", "use pi0_mps::ros; use pi0_mps::cli;"),
        (
            "model/frame.rs",
            "// use crate::node; unsafe\n/* crate::node /* unsafe */ */ const A: &str = \"unsafe crate::node\";",
        ),
        ("model/frame.rs", "mod tests { use super::*; use super::super::tokenizer::Tokenizer; }"),
        ("engine/cpu/mod.rs", "mod a { mod b { use super::super::super::super::model::Dims; } }"),
    ] {
        assert_eq!(breaches(&layers, file, text), Vec::<String>::new(), "{file}: {text}");
    }
}
